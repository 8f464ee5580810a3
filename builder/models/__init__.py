"""MLflow and Domino: the only importer of mlflow, whose types never leave this package."""
