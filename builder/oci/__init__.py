"""OCI images: descriptors, manifests, layouts, layers, registries. Nothing here knows MLflow."""
