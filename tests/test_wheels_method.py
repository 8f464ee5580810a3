"""The wheels method as its users see it: from a registered version to an image in a registry that runs."""

from __future__ import annotations

import json

from builder.publish import publish


def test_a_version_without_a_template_is_assembled_and_runs(small, small_settings, base_image, runtime, crane):
    model = small()
    published = publish(small_settings(model, BASE_IMAGE=base_image))
    assert "PASS" in crane("validate", "--remote", str(published.reference))
    assert runtime.output(published.reference) == "prediction 42 small 11\n"
    manifest = json.loads(crane("manifest", str(published.reference)))
    assert manifest["annotations"]["io.modelimage.method"] == "wheels"
