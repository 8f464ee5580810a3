"""The servers that the tests run against: registries, MLflow, an object store."""
