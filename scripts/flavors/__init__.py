"""`make flavors`: a model of every flavor and of many MLflow releases, saved, published, run and asked."""
