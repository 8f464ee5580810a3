"""OCI images: names, layouts, manifests, registries. Nothing here knows of MLflow."""
