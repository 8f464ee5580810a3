"""The publisher on a real Kubernetes."""
