"""From a context to layouts: templates and the engines that run a Dockerfile."""
