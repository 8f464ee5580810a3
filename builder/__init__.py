"""Publish registered MLflow models as container images, from inside Kubernetes, without a Docker daemon."""

__version__ = "0.1.0"
