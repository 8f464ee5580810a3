"""No credential of the publisher's is shown, in whatever file it stands and however another program quotes it."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shlex
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import pytest

from builder import log
from builder.clients import Registries
from builder.errors import InvalidSettings, PermissionRefused
from builder.masking import masked, one_line, shown
from builder.models.store import ArtifactStore, Root
from builder.oci.authn import Credential, Credentials
from builder.process import Lines
from builder.reference import Reference
from builder.settings import Settings
from tests.servers.http_server import in_thread
from tests.versions import register, seed_layout
from tests.waiting import HANG, LONG_HANG

GOOD = {"MLFLOW_TRACKING_URI": "http://mlflow.example.com", "REGISTRY_URL": "quay.io/domino"}
ODD = "pä/ss+w\"o'r\\d %&<x>"
PLAIN = "c0rrectH0rseBatteryStaple9"
ENCODINGS = {
    "plain": lambda text: text,
    "percent": lambda text: quote(text, safe=""),
    "percent, slashes kept": lambda text: quote(text, safe="/"),
    "percent, lower case": lambda text: re.sub("%..", lambda found: found[0].lower(), quote(text, safe="")),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 without padding": lambda text: base64.b64encode(text.encode()).decode().rstrip("="),
    "base64 for URLs": lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
    "base64 in a URL": lambda text: quote(base64.b64encode(text.encode()).decode(), safe=""),
    "JSON": json.dumps,
    "JSON in Unicode": lambda text: json.dumps(text, ensure_ascii=False),
    "JSON with escaped slashes": lambda text: json.dumps(text).replace("/", "\\/"),
    "Python": repr,
    "Python's bytes": lambda text: repr(text.encode()),
    "HTML": html.escape,
    "a shell's backslashes": lambda text: "".join(c if c.isalnum() else f"\\{c}" for c in text),
    "a shell's quotes": shlex.quote,
}


def held(text: str) -> bool:
    """Return whether nothing of a text is left but asterisks, quotes and base64's padding."""
    left = masked(text).replace("%3D", "=")
    return "*****" in left and not left.replace("*****", "").strip("\"'b=")


@pytest.mark.parametrize("secret", [ODD, PLAIN])
@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
def test_a_secret_is_masked_however_it_is_quoted(encode, secret):
    log.mask([secret])
    assert held(encode(secret))


@pytest.mark.parametrize("user", ["me", "abc", "robot$domino", "ü"])
@pytest.mark.parametrize("secret", [ODD, PLAIN, "eightchr"])
def test_the_base64_of_any_user_and_the_secret_gives_nothing_away(secret, user):
    log.mask([secret])
    code = base64.b64encode(f"{user}:{secret}".encode()).decode()
    left = masked(f"Authorization: Basic {code} refused").split()[2]
    before, _, after = left.partition("*****")
    told = base64.b64decode(before + "A" * (-len(before) % 4)) if before else b""
    assert "*****" in left
    # At most the bits of one character on either side.
    assert not told.startswith(f"{user}:{secret[:2]}".encode())
    assert len(after) <= 4


def test_parts_of_a_random_secret_are_masked():
    secret = "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789aBcDeFgHiJkL"
    log.mask([secret])
    # A program that writes for 80 columns breaks a long word, one that quotes only the beginning cuts it.
    for part in (secret[:30], secret[10:], secret[7:35]):
        assert masked(f"error: {part}") == "error: *****"
    assert masked("an ordinary word_of-a/kind+") == "an ordinary word_of-a/kind+"


def test_a_secret_that_a_limit_cuts_is_masked():
    log.mask(["hunter-two-and-three"])
    text = "x" * 90 + " hunter-two-and-three"
    for limit in range(90, 112):
        assert "hunt" not in one_line(text, limit)
    # The reader of a program's output has cut before anybody could mask.
    lines = Lines(limit=100)
    (cut,) = lines.feed(f"{text}\n".encode())
    assert cut.endswith("hunter-t…")
    assert "hunt" not in one_line(cut)


def test_every_line_of_a_key_is_masked():
    body = [base64.b64encode(bytes(range(start, start + 48))).decode() for start in range(0, 192, 48)]
    key = "\n".join(["-----BEGIN PRIVATE KEY-----", *body, "-----END PRIVATE KEY-----", ""])
    log.mask([key])
    for line in body:
        assert masked(f"unknown option: {line}") == "unknown option: *****"
    assert masked("-----BEGIN PRIVATE KEY-----") == "-----BEGIN PRIVATE KEY-----"


def test_a_short_password_is_masked_where_something_tells_that_it_is_one():
    log.mask(["abcde"], user="me")
    code = base64.b64encode(b"me:abcde").decode()
    for text in ("x:abcde@host", "me:abcde", "password abcde", "password=abcde", '"password": "abcde"', code):
        assert "abcde" not in masked(text)
        assert code.rstrip("=") not in masked(text)
    assert masked("the letters abcde") == "the letters abcde"


def test_overlapping_secrets_leave_nothing():
    log.mask(["abcdefgh", "efghijkl", "abcdef"])
    assert masked("-abcdefghijkl-abcdef-") == "-*****-*****-"


# ---- files


def docker(entry):
    return {"docker/config.json": json.dumps({"auths": {"quay.io": entry}})}, {"DOCKER_CONFIG": "docker"}


KEY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj"
FILES = {
    "docker, auth": docker({"auth": base64.b64encode(b"me:the-secret-1").decode()}),
    "docker, password": docker({"username": "me", "password": "the-secret-1"}),
    "docker, identity token": docker({"identitytoken": "the-secret-1"}),
    "docker, registry token": docker({"registrytoken": "the-secret-1"}),
    "docker, headers": ({"d/config.json": '{"HttpHeaders": {"X-Meta": "the-secret-1"}}'}, {"DOCKER_CONFIG": "d"}),
    "docker of the home folder": (
        {".docker/config.json": json.dumps({"auths": {"x": {"password": "the-secret-1"}}})},
        {},
    ),
    "docker of the build phase": (
        {"b/config.json": json.dumps({"auths": {"x": {"password": "the-secret-1"}}})},
        {"BUILD_DOCKER_CONFIG": "b"},
    ),
    "netrc": ({"n": "machine a.b login me password the-secret-1\n"}, {"NETRC": "n"}),
    "netrc, malformed": ({"n": 'machine a\nlogin me\npassword\n  "the-secret-1" oops'}, {"NETRC": "n"}),
    "netrc of the home folder": ({".netrc": "default login me password the-secret-1"}, {}),
    "pip.conf": ({"p": "[global]\nindex-url = https://me:the-secret-1@x.example/simple\n"}, {"PIP_CONFIG_FILE": "p"}),
    "pip.conf, percent": (
        {"p": "[global]\nextra-index-url =\n  https://a/\n  https://the%2Dsecret%2D1@x.example/simple\n"},
        {"PIP_CONFIG_FILE": "p"},
    ),
    "pip.conf of the home folder": ({".config/pip/pip.conf": "[global]\nindex-url = https://the-secret-1@x/y"}, {}),
    "uv.toml of the home folder": ({".config/uv/uv.toml": 'index-url = "https://u:the-secret-1@x/y"'}, {}),
    "aws": ({"a": "[default]\naws_secret_access_key = the-secret-1\n"}, {"AWS_SHARED_CREDENTIALS_FILE": "a"}),
    "aws of the home folder": ({".aws/credentials": "[x]\naws_session_token=the-secret-1\n"}, {}),
    "aws, web identity": ({"a": "the-secret-1"}, {"AWS_WEB_IDENTITY_TOKEN_FILE": "a"}),
    "google, refresh token": (
        {"g": json.dumps({"refresh_token": "the-secret-1"})},
        {"GOOGLE_APPLICATION_CREDENTIALS": "g"},
    ),
    "google, key": (
        {"g": json.dumps({"private_key": f"-----BEGIN PRIVATE KEY-----\n{KEY}\nthe-secret-1\n-----END"})},
        {"GOOGLE_APPLICATION_CREDENTIALS": "g"},
    ),
    "mlflow of the home folder": ({".mlflow/credentials": "[mlflow]\nmlflow_tracking_password = the-secret-1\n"}, {}),
    "mlflow, client key": (
        {"k": f"-----BEGIN RSA PRIVATE KEY-----\n{KEY}\nthe-secret-1\n-----END RSA PRIVATE KEY-----\n"},
        {"MLFLOW_TRACKING_CLIENT_CERT_PATH": "k"},
    ),
    "secrets, setting": ({"s/REGISTRY_TOKEN": "the-secret-1\n", "s/REGISTRY_USER": "me"}, {"SECRETS_DIR": "s"}),
    "secrets, unknown": ({"s/SOMETHING": "the-secret-1\n"}, {"SECRETS_DIR": "s"}),
    "secrets, token": ({"s/token": "the-secret-1\n"}, {"SECRETS_DIR": "s"}),
    "secrets, docker": (
        {"s/.dockerconfigjson": json.dumps({"auths": {"x": {"auth": base64.b64encode(b"u:the-secret-1").decode()}}})},
        {"SECRETS_DIR": "s"},
    ),
    "variable, proxy": ({}, {"HTTPS_PROXY": "http://me:the-secret-1@proxy:3128"}),
    "variable, proxy without scheme": ({}, {"https_proxy": "me:the-secret-1@proxy:3128"}),
    "variable, index": ({}, {"UV_INDEX": "mine=https://me:the-secret-1@x/simple"}),
    "variable, Azure": (
        {},
        {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=a;AccountKey=the-secret-1;EndpointSuffix=core.windows.net"},
    ),
    "variable, MLflow": ({}, {"MLFLOW_TRACKING_URI": "https://me:the-secret-1@mlflow.example.com"}),
}


@pytest.fixture
def placed(tmp_path):
    """Write files below a home folder, and give the environment that names them."""

    def place(files, variables):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        names = {
            name: str(tmp_path / value) if (tmp_path / value).exists() else value for name, value in variables.items()
        }
        return {**GOOD, "HOME": str(tmp_path), **names}

    return place


@pytest.mark.parametrize(("files", "variables"), FILES.values(), ids=FILES)
def test_what_a_credential_file_holds_is_masked_before_anybody_asks_for_it(placed, files, variables):
    Settings.from_environ(placed(files, variables))
    assert masked("quoted: the-secret-1") == "quoted: *****"
    code = base64.b64encode(b"someone:the-secret-1").decode()
    # What is left says who, and two bits of the last character.
    assert re.fullmatch(r"c29tZW9uZT.?\*{5}.?=", masked(code))
    for content in files.values():
        assert "the-secret-1" not in masked(content)
        assert KEY not in masked(content)


def test_a_password_that_nobody_encoded_is_a_secret_too():
    Settings.from_environ(
        {
            **GOOD,
            "PIP_INDEX_URL": "https://me:slash/and@sign@x.example/simple",
            "PIP_EXTRA_INDEX_URL": "https://me:quote'and\"quote@y.example/simple",
        }
    )
    assert masked("slash/and@sign") == masked("quote'and\"quote") == "*****"


@pytest.mark.parametrize("value", ["      ", "\n\n\n\n\n\n\n", "a       ", "\t \t \t \t", "-----BEGIN X-----\n"])
def test_a_value_of_blanks_hides_no_log(value):
    log.mask([value], user="me")
    for text in ("a      b", "a\n\n\n\n\n\n\n\nb", "aaaa abcd", "\t \t \t \t"):
        assert masked(text) == text


def test_malformed_credential_files_do_no_harm(placed):
    hostile = {
        "docker/config.json": "[" * 100_000,
        "n": "machine",
        "p": "\0" * 1000,
        ".aws/credentials": "=" * 100_000,
        ".mlflow/credentials": "[",
        "docker2/config.json": '{"auths": {"a": {"auth": "\\ud800", "password": "\\ud800\\udfff\\ud800 long"}, "b": [[{}]]}}',
    }
    environ = placed(hostile, {"DOCKER_CONFIG": "docker", "BUILD_DOCKER_CONFIG": "docker2", "NETRC": "n"})
    assert Settings.from_environ(environ).registry_url
    assert masked("nothing of it") == "nothing of it"


def test_the_folder_of_secrets_and_its_plain_settings_are_no_secrets(placed):
    environ = placed(
        {"s/REGISTRY_USER": "publisher", "s/TARGET_TAG": "EXTERNAL", "s/REGISTRY_TOKEN": "the-secret-1"},
        {"SECRETS_DIR": "s"},
    )
    Settings.from_environ(environ)
    text = f"{environ['SECRETS_DIR']}/REGISTRY_TOKEN of publisher for EXTERNAL"
    assert masked(text) == text


@pytest.mark.parametrize("name", ["REGISTRY_URL", "TARGET_PLATFORMS", "BUILD_CACHE", "BASE_IMAGE"])
def test_settings_that_are_refused_show_no_secret(name):
    environ = {**GOOD, "MODEL_NAME": "", name: "https://me:the-secret-1@x/y"}
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environ(environ, ("MODEL_NAME",))
    # They were known before the settings were refused.
    assert masked("the-secret-1") == "*****"
    assert "the-secret-1" not in caught.value.one_line()


def test_what_a_helper_answers_is_masked(tmp_path, monkeypatch):
    program = tmp_path / "docker-credential-mine"
    program.write_text('#!/bin/sh\necho \'{"Username": "me", "Secret": "the-secret-1"}\'\n')
    program.chmod(0o755)
    (tmp_path / "config.json").write_text('{"credsStore": "mine"}')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = Credentials(docker_config=tmp_path).for_host("quay.io")
    assert found is not None
    assert masked("the-secret-1") == "*****"
    assert found.basic[6:-2] not in masked(found.basic)


def test_a_token_of_a_registry_is_masked(token_registry):
    server = token_registry
    credentials = Credentials(explicit=server.host, credential=Credential(server.user, server.password))
    with Registries(credentials) as registries:
        registry = registries.for_host(server.host)
        assert registry.manifest(Reference.parse(f"{server.host}/some/model:v1")) is None
        (held,) = registry._transport._authorizer._tokens.values()
    assert len(held.value) > 100
    assert masked(f"Bearer {held.value}, from {server.password}") == "Bearer *****, from *****"


def test_what_pip_quotes_of_a_docker_config_is_masked(placed):
    """The file's first line is what pip says is no requirement, credential included."""
    code = base64.b64encode(b"robot:the-secret-1-of-docker").decode()
    files = {"docker/config.json": json.dumps({"auths": {"quay.io": {"auth": code}}})}
    environ = placed(files, {"DOCKER_CONFIG": "docker"})
    Settings.from_environ(environ)
    argv = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-index",
        "-r",
        f"{environ['DOCKER_CONFIG']}/config.json",
    ]
    said = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=HANG)
    assert code in said.stdout + said.stderr
    assert code[:12] not in shown(said.stdout + said.stderr)


# ---- addresses


@pytest.mark.parametrize(
    ("text", "shows"),
    [
        ("-e git+https://github.com/o/r.git@rev", "-e git+https://github.com/o/r.git@rev"),
        ("git+ssh://git@github.com/o/r.git@rev", "git+ssh://github.com/o/r.git@rev"),
        ("https://user:pw@host/x", "https://host/x"),
        ("https://token@host/x", "https://host/x"),
        ("https://user:p@ss@host/x", "https://host/x"),
        ("https://user:pa/ss@host/x", "https://host/x"),
        ("https://user:p@ss/word@host.example/x", "https://host.example/x"),
        ("https://u:pw@host.example/o/r.git@rev", "https://host.example/o/r.git@rev"),
        ("https://host:8443/a@b", "https://host:8443/a@b"),
        ("https://[::1]:8443/a@b", "https://[::1]:8443/a@b"),
        ("oci://host/x@sha256:abc", "oci://host/x@sha256:abc"),
        ("http://a/?next=https://u:pw@b", "http://a/?next=https://b"),
        ("'https://u:pw@a' and me@example.com", "'https://a' and me@example.com"),
    ],
)
def test_what_of_an_address_is_a_credential(text, shows):
    assert one_line(text) == shows


SIGNED = [
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AK1/20261127&X-Amz-Security-Token=T0ken%2F&X-Amz-Signature=51gn",
    "Expires=1&AWSAccessKeyId=AK1&Signature=51gn%3D",
    "X-Goog-Credential=AK1&X-Goog-Signature=51gn",
    "sv=2024-08-04&se=2026-11-27&sr=b&sig=51gn%3D",
    "access_token=T0ken",
    "api_key=T0ken&x=y",
]


@pytest.mark.parametrize("query", SIGNED)
@pytest.mark.parametrize("mark", ["&", "&amp;"])
def test_what_signs_an_address_is_a_credential(query, mark):
    text = f"403 Client Error: Forbidden for url: https://bucket.example.com/a/b?{query.replace('&', mark)} (try again)"
    for said in (one_line(text), masked(text), shown(text)):
        assert not any(secret in said for secret in ("AK1", "T0ken", "51gn"))
        assert "https://bucket.example.com/a/b?" in said
        assert said.endswith(" (try again)")


def test_json_stays_json_where_a_name_looks_signed():
    names = ['x?sig=a"b', "x?token=a\\", "x&secret=\\n"]
    assert len(json.loads(masked(json.dumps(names)))) == len(names)


def test_a_signed_address_that_a_store_redirects_to_stays_out_of_errors(tmp_path):
    """A server's gateway may send downloads to its bucket; requests quotes the address that refused."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if "signed" in self.path:
                seen.append(dict(self.headers))
                self.send_error(403)
                return
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.2:{server.server_port}/signed/MLmodel?{SIGNED[0]}")
            self.end_headers()

        def log_message(self, *_):
            pass

    seen = []
    server = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    with in_thread(server):
        uri = f"http://127.0.0.1:{server.server_port}"
        root = Root("mlflow-artifacts:/1/run/artifacts", "")
        with pytest.raises(PermissionRefused) as caught:
            ArtifactStore(uri).download(root.artifact("MLmodel", 1), tmp_path / "MLmodel")
    assert seen
    assert "/signed/MLmodel?" in str(caught.value)
    assert not any(secret in str(caught.value) for secret in ("AK1", "T0ken", "51gn"))


LONG = {
    "queries": "?&sig" * 20_000,
    "names of signatures": "&" + "signature-token" * 6_000,
    "signatures": "?sig=a" * 15_000,
    "letters": "a" * 80_000,
    "schemes": "a://" * 20_000,
    "users": "https://a:" * 20_000,
    "signs": "@" * 80_000,
    "slashes": "https://" + "a:/" * 30_000,
    "blanks": " " * 80_000 + "x",
    "escapes": "\x1b\u202e" * 40_000,
    "asterisks": "the-secret-" * 10_000,
    "parts": "AbCdEfGhIjKlMnOpQrStUvWx" * 4_000,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_long_text_takes_time_in_proportion(text):
    log.mask(["the-secret-1", "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"])
    began = time.process_time()
    one_line(text)
    shown(text)
    masked(text)
    # A tenth of a second is needed; the quadratic ones took five and more.
    assert time.process_time() - began < 3


# ---- where it all goes


def test_a_build_that_prints_secrets_shows_none(mlflow_server, registry, base_image, tmp_path, placed):
    """The author does not know them; that every encoding is masked at every sink is what is shown here."""
    secret, token = "pa/ss wörd-of-mlflow", "t0k3n+of+the+registry"
    words = [encode(each) for encode in ENCODINGS.values() for each in (secret, token)]
    words.append(base64.b64encode(f"publisher:{token}".encode()).decode())
    echoes = "; ".join(f"echo {shlex.quote(word)}" for word in words)
    last = "; ".join(f"echo -n {shlex.quote(word)}' '" for word in words)
    model = register(
        mlflow_server.uri,
        seed_layout(base_image, f"FROM {{base}}\nRUN {echoes}; {last}; false\n".replace("{base}", base_image)),
    )
    message = tmp_path / "message"
    message.touch()
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "REGISTRY_URL": f"{registry.host}/hostile",
        "REGISTRY_USER": "publisher",
        "REGISTRY_TOKEN": token,
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": secret,
        "TERMINATION_LOG": str(message),
        "LOG_LEVEL": "debug",
    }
    done = subprocess.run(
        [sys.executable, "-m", "builder", "publish", model.name, model.version],
        check=False, text=True, capture_output=True, env=environ, timeout=LONG_HANG,
    )  # fmt: skip
    assert done.returncode == 73, done.stderr
    whole = "\n".join([done.stdout, done.stderr, message.read_text(), *model.tags().values()])
    assert "*****" in model.outcome()["error"]
    for word in words:
        for form in (word, json.dumps(word)[1:-1], json.dumps(word, ensure_ascii=False)[1:-1]):
            assert form.strip("\"'b=") not in whole
