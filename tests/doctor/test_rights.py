"""What is asked of the cluster, and what is found where there is none; a real one is asked in tests/cluster/."""

import json
from pathlib import Path

import yaml

from builder.doctor.rights import HELD, NEEDED, POLICIES, USEFUL

K8S = Path(__file__).parents[2] / "k8s"


def documents(*paths):
    return [each for path in paths for each in yaml.safe_load_all(path.read_text()) if each]


def test_the_rights_are_those_of_the_role():
    (role,) = [each for each in documents(K8S / "base" / "accounts.yaml") if each["kind"] == "Role"]
    allowed = {
        (group, kind, name, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for kind in rule["resources"]
        for name in rule.get("resourceNames", [""])
        for verb in rule["verbs"]
    }
    asked = {(group, kind, name, verb) for group, kind, name, verbs in (*NEEDED, *USEFUL, *HELD) for verb in verbs}
    assert asked == allowed


def test_the_policies_are_those_of_the_base():
    there = {
        (
            f"{each['kind'].lower().removesuffix('y')}{'ies' if each['kind'].endswith('y') else 's'}",
            each["metadata"]["name"],
        )
        for each in documents(*(K8S / "policies").glob("builder-*.yaml"))
    }
    assert set(POLICIES) <= there


def test_a_cluster_that_is_away(doctor, tmp_path, dead_port):
    context = {"cluster": "away", "user": "nobody"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "away", "cluster": {"server": f"http://127.0.0.1:{dead_port}"}}],
        "users": [{"name": "nobody", "user": {"token": "a-token-of-nobody"}}],
        "contexts": [{"name": "away", "context": context}],
        "current-context": "away",
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    found = {}
    # A kubeconfig of something else may be on a laptop.
    for wanted in (), ("-n", "builder"):
        done = doctor("-o", "json", *wanted, KUBECONFIG=str(tmp_path / "kubeconfig"))
        found[wanted] = {row["check"]: (row["state"], row["exit_code"]) for row in json.loads(done.stdout)}
    assert found[()]["cluster"] == ("warn", 0)
    assert found["-n", "builder"]["cluster"] == ("fail", 69)
    assert found["-n", "builder"]["rights"] == ("skipped", 0)
