"""Publish a registered model version out of a Domino run, without installing anything.

One file of the standard library, for Python 3.9 and newer. Copy it into the project, and run it as the last command of
a job, or call it in a notebook:

    python publish_hook.py                      # the newest selected version that this run registered
    python publish_hook.py pump_alarm 3
    python publish_hook.py pump_alarm @champion --how listener

    from publish_hook import publish
    print(publish("pump_alarm", "3")["image"])

It publishes in the first way that is possible: in this job, where there is a `builder` program or BUILDER_PACKAGE can
be installed; through the listener at LISTENER_URL, with SUBMIT_SECRET; by the Kubernetes API. It follows to the end,
adds what came of it to dominostats.json, prints the image's digest reference, and exits with the publisher's code.
docs/domino.md describes the settings and the rights that each way needs.
"""

from __future__ import annotations

import argparse
import base64
import copy
import hashlib
import hmac
import http.client
import ipaddress
import json
import math
import os
import re
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import tempfile
import time
import unicodedata
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

USAGE, DATA, NO_INPUT, AWAY, DEFECT, FAILED, AGAIN, REFUSED, SETTINGS = 64, 65, 66, 69, 70, 73, 75, 77, 78
WAYS = ("here", "listener", "cluster")
FINAL = ("published", "failed", "foreign")
DEFAULT_TAG = "EXTERNAL_TARGET_PLTR_FOUNDRY"
STATS = "dominostats.json"
MOST_BYTES = 10 << 20
# Seconds for a request, that the listener holds a question, and between two looks at a Job.
REQUEST, HELD, LOOK = 60, 25, 2
DAY = 24 * 3600
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TEMPLATES = {"wheels": "builder-publish-wheels", "dockerfile": "builder-publish-dockerfile"}
OURS = ("preflight", "fetch", "candidate", "push", "publish")
# What decides whether a version's image has to be made again, as `builder` has it.
LAYOUT_VERSION = 1
INPUT_TAGS = (
    "MODEL_FOLDER",
    "MODEL_CLIENT_FOLDER",
    "MODEL_TEMPLATES_FOLDER",
    "MODEL_ENTRY_POINT",
    "MODEL_EXECUTE_PATH",
    "MODEL_BASE_IMAGE",
    "MODEL_DOCKERFILE",
)


class HookError(Exception):
    """What failed, what to do about it, and the exit code (those of sysexits)."""

    def __init__(self, what, remedy="", code=DEFECT):
        super().__init__(f"{what} {remedy}".strip())
        self.what, self.remedy, self.code = one_line(what), one_line(remedy), code
        self.result, self.state = {}, "failed"


class NotPossible(Exception):
    """A way cannot be taken; nothing was changed."""

    def __init__(self, error):
        super().__init__(error.what)
        self.error = error


class Ended(BaseException):
    """The process was asked to end."""


# ---- texts, files, requests


def one_line(text, most=1000):
    """Return a text on one line, without control characters."""
    text = "".join(" " if unicodedata.category(each)[0] in "CZ" else each for each in str(text))
    text = re.sub(" +", " ", text).strip()
    return text if len(text) <= most else text[: most - 1] + "…"


def say(text):
    """Tell people, on stderr: stdout has the digest reference alone."""
    print(f"publish_hook: {one_line(text, 4000)}", file=sys.stderr, flush=True)


def out_of_time(run, remedy):
    """Return the error that a Job has not ended in the time that was given."""
    error = HookError(f"The Job {run.job} has not ended after {run.timeout:g} s, and goes on.", remedy, AGAIN)
    error.state = "running"
    return error


def missing(*names):
    return HookError(f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing.", "Set it.", SETTINGS)


def is_loopback(host):
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A credential goes to the address that was named, and to no other."""

    def redirect_request(self, *_arguments):
        return None


def request(method, url, *, what, headers=None, body=None, ca=None, seconds=REQUEST, direct=False):
    """Return status and content of an answer.

    Raises:
        HookError: there is none; `what` names the server.
    """
    host = urlsplit(url).hostname
    proxies = urllib.request.ProxyHandler({} if direct or is_loopback(host) else None)
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except (OSError, ssl.SSLError) as error:
        raise HookError(
            f"The CA bundle of the {what} cannot be read: {error}.", "Name a file in PEM.", SETTINGS
        ) from error
    opener = urllib.request.build_opener(proxies, NoRedirect, urllib.request.HTTPSHandler(context=context))
    if not re.match("https?://", url):
        raise HookError(f"The address of the {what} is not one of the web.", "Give it with https://.", SETTINGS)
    headers = {"Accept": "application/json", **(headers or {})}
    asked = urllib.request.Request(url, data=body, method=method, headers=headers)  # noqa: S310  # see above
    try:
        with opener.open(asked, timeout=seconds) as answer:
            return answer.status, answer.read(MOST_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            if 300 <= error.code < 400:
                what = f"The {what} at {host} redirects, which is refused."
                raise HookError(what, "Name the address that it redirects to.", SETTINGS) from error
            return error.code, error.read(MOST_BYTES)
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        if isinstance(why, ssl.SSLCertVerificationError):
            message = f"The certificate of the {what} at {host} is not trusted: {why.verify_message}."
            raise HookError(message, "Name a bundle with its authority in SSL_CERT_FILE.", SETTINGS) from error
        remedy = "Check its address, and whether a network policy lets this run reach it."
        raise HookError(f"The {what} at {host} cannot be reached: {why}.", remedy, AWAY) from error


def parsed(content):
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def patiently(act, seconds):
    """Return what `act` returns, trying again for some seconds while a service is away."""
    until, pause = time.monotonic() + seconds, 0.5
    while True:
        try:
            return act()
        except HookError as error:
            if error.code not in (AWAY, AGAIN) or time.monotonic() + pause > until:
                raise
            say(f"trying again in {pause:g} s: {error.what}")
        time.sleep(pause)
        pause = min(pause * 2, 15)


def write_json(path, values):
    """Write a file, whole or not at all, and return why that was not possible."""
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=str(path.parent))
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=2) + "\n")
        mask = os.umask(0o022)
        os.umask(mask)
        os.chmod(temporary, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~mask)  # noqa: PTH101
        os.replace(temporary, str(path))  # noqa: PTH105
    except OSError as error:
        if temporary and os.path.exists(temporary):  # noqa: PTH110
            os.unlink(temporary)  # noqa: PTH108
        return f"{path} cannot be written: {error.strerror}"
    return ""


def add_stats(path, values):
    """Add columns to dominostats.json, and return why that was not possible; what others wrote stays."""
    there = {}
    try:
        if path.exists():
            if not path.is_file() or path.stat().st_size > MOST_BYTES:
                return f"{path} is left as it is: it is no small file"
            there = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"{path} is left as it is: {error.strerror}"
    except (ValueError, RecursionError):
        there = None
    if not isinstance(there, dict):
        return f"{path} is left as it is: it holds something else than a JSON object"
    if there.get("state") in ("failed", "running"):
        there = {name: value for name, value in there.items() if name not in ("error", "exit_code")}
    return write_json(path, {**there, **values})


# ---- which version


class Mlflow:
    """MLflow's REST API, as far as it is used."""

    def __init__(self, environ):
        self.url = environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
        self.ca = environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or environ.get("SSL_CERT_FILE")
        self.headers = {}
        user, password = environ.get("MLFLOW_TRACKING_USERNAME"), environ.get("MLFLOW_TRACKING_PASSWORD", "")
        if environ.get("MLFLOW_TRACKING_TOKEN"):
            self.headers["Authorization"] = f"Bearer {environ['MLFLOW_TRACKING_TOKEN']}"
        elif user:
            pair = base64.b64encode(f"{user}:{password}".encode()).decode()
            self.headers["Authorization"] = f"Basic {pair}"
        # In a Domino run the server is a proxy on loopback, which adds the identity.
        if environ.get("DOMINO_USER_API_KEY") and not is_loopback(urlsplit(self.url).hostname):
            self.headers["X-Domino-Api-Key"] = environ["DOMINO_USER_API_KEY"]

    def ask(self, method, path, /, **asked):
        if not re.match(r"https?://", self.url):
            raise HookError("MLFLOW_TRACKING_URI is missing, or is not the address of a server.", "Set it.", SETTINGS)
        url, body, headers = f"{self.url}/api/2.0/mlflow/{path}", None, dict(self.headers)
        if method == "GET":
            url += "?" + urlencode(asked)
        else:
            body, headers["Content-Type"] = json.dumps(asked).encode(), "application/json"

        def send():
            status, content = request(method, url, what="MLflow server", headers=headers, body=body, ca=self.ca)
            found = parsed(content)
            if status == 200:
                return found
            said = f"MLflow answered {path} with status {status}: {found.get('message') or 'nothing more'}."
            if status in (401, 403):
                raise HookError(said, "Check the credential for MLflow.", REFUSED)
            if status == 404 or found.get("error_code") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise HookError(said, "Check the model's name and version.", NO_INPUT)
            raise HookError(said, "Try again when it answers.", AWAY)

        return patiently(send, 30)

    def pages(self, method, path, key, /, **asked):
        token = ""
        while True:
            found = self.ask(method, path, **asked, **({"page_token": token} if token else {}))
            yield from found.get(key) or []
            token = found.get("next_page_token") or ""
            if not token:
                return

    def find(self, model, version):
        """Return a version as MLflow has it, by its number or its alias."""
        if version.startswith("@"):
            return self.version_in(self.ask("GET", "registered-models/alias", name=model, alias=version[1:]))
        if not re.fullmatch("[0-9]{1,10}", version):
            raise HookError(f"{version!r} is not a version.", "Give a number, or an alias such as @champion.", NO_INPUT)
        return self.version_in(self.ask("GET", "model-versions/get", name=model, version=str(int(version))))

    def version_in(self, answer):
        found = answer.get("model_version")
        if not isinstance(found, dict) or "version" not in found:
            what = f"MLflow at {urlsplit(self.url).hostname} answers with something else than a version."
            raise HookError(what, "Check MLFLOW_TRACKING_URI: a sign-in page may answer there.", AWAY)
        return found

    def runs_of(self, domino_run):
        """Yield the MLflow runs that were begun in a Domino run: Domino tags them."""
        ids = [
            each["experiment_id"] for each in self.pages("POST", "experiments/search", "experiments", max_results=1000)
        ]
        query = f"tags.`mlflow.domino.run_id` = '{domino_run}'"
        for start in range(0, len(ids), 1000):
            some = ids[start : start + 1000]
            found = self.pages("POST", "runs/search", "runs", experiment_ids=some, filter=query, max_results=1000)
            yield from (each["info"]["run_id"] for each in found)

    def newest_of_run(self, environ):
        """Return the newest selected version that this run registered."""
        tag = environ.get("TARGET_TAG") or DEFAULT_TAG
        name = "MLFLOW_RUN_ID" if environ.get("MLFLOW_RUN_ID") else "DOMINO_RUN_ID"
        run, remedy = environ.get(name, ""), "Name the version: MODEL_NAME and MODEL_VERSION, or two arguments."
        if not re.fullmatch("[0-9A-Za-z_-]{1,100}", run):
            raise HookError(f"No version is named, and {name} is no run's id.", remedy, SETTINGS)
        runs = [run] if name == "MLFLOW_RUN_ID" else list(self.runs_of(run))
        found = []
        for start in range(0, len(runs), 100):
            query = "run_id IN ({})".format(", ".join(f"'{each}'" for each in runs[start : start + 100]))
            found += self.pages("GET", "model-versions/search", "model_versions", filter=query, max_results=1000)
        selected = [each for each in found if tags_of(each).get(tag, "").strip().lower() == "true"]
        if not selected:
            names = ", ".join(sorted({f"{each['name']} {each['version']}" for each in found})) or "none"
            message = f"This run ({name}) has registered no version with the tag {tag}=true; without it: {names}."
            raise HookError(message, f"Set the tag. {remedy}", NO_INPUT)
        return max(selected, key=lambda each: (int(each.get("creation_timestamp") or 0), int(each["version"])))


def tags_of(version):
    return {each["key"]: each.get("value", "") for each in version.get("tags") or []}


def named_version(model, version, environ):
    """Return model and version: those given, or the newest selected ones of this run."""
    if bool(model) != bool(version):
        raise HookError("A model and a version go together.", "Name both, or neither.", SETTINGS)
    if model:
        return model, str(version)
    found = Mlflow(environ).newest_of_run(environ)
    say(f"the newest selected version of this run is {found['name']} {found['version']}")
    return found["name"], str(found["version"])


# ---- the first way: in this job


def here(run):
    with tempfile.TemporaryDirectory(prefix="publish-hook-") as folder:
        program = find_program(run.environ, Path(folder))
        left = Path(folder) / "result.json"
        argv = [program, "hook", run.model, run.version, "--how", "here", "--result", str(left)]
        environ = {**run.environ, "LOG_FORMAT": run.environ.get("LOG_FORMAT") or "text"}
        # This file writes what the dashboard shows.
        environ.pop("DOMINO_WORKING_DIR", None)
        say(f"trying {program}")
        with subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
            try:
                process.communicate()
            except BaseException:
                process.terminate()
                raise
        result = parsed(left.read_bytes()) if left.is_file() else {}
    code = process.returncode
    if code == 0 and result.get("state") in FINAL:
        return {**result, "how": "here"}
    what = str(result.get("error") or f"{program} ended with exit code {code}.")
    error = HookError(what, str(result.get("remedy") or "Its last lines tell why."), code if code > 0 else AGAIN)
    # It has named no way: it saw that this one is not possible, and has changed nothing. One that was killed has not.
    if not result.get("how") and 0 < code < 128:
        raise NotPossible(error)
    raise error


def find_program(environ, temporary):
    """Return a `builder` that has the hook: BUILDER_PROGRAM, one on PATH, or one that is installed now.

    Args:
        environ: the environment.
        temporary: folder for one that cannot be kept for the next time.
    """
    named = environ.get("BUILDER_PROGRAM", "")
    candidates = (
        [named, str(Path(named) / "bin" / "builder")] if named else [shutil.which("builder", path=environ.get("PATH"))]
    )
    for candidate in candidates:
        if candidate and os.path.isfile(candidate) and has_hook(candidate, environ):  # noqa: PTH113
            return candidate
    if named:
        raise NotPossible(
            HookError(f"BUILDER_PROGRAM is {named!r}, which is no builder that has `hook`.", "", SETTINGS)
        )
    package = environ.get("BUILDER_PACKAGE", "")
    if not package:
        message = "No `builder` program is on PATH, and BUILDER_PACKAGE names none to install."
        raise NotPossible(HookError(message, "Set BUILDER_PROGRAM or BUILDER_PACKAGE.", SETTINGS))
    if not environ.get("REGISTRY_URL"):
        raise NotPossible(missing("REGISTRY_URL"))
    return installed(package, environ, temporary)


def has_hook(program, environ):
    try:
        asked = subprocess.run([program, "hook", "--help"], env=environ, capture_output=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0 and b"dominostats.json" in asked.stdout


def installed(package, environ, temporary):
    """Install a package into an environment of its own, unless that was done before, and return its program."""
    python = next(filter(None, map(python_at, ("3.13", "3.12", "3.11"))), None)
    if python is None:
        message = "BUILDER_PACKAGE needs Python 3.11, 3.12 or 3.13, and none of them is here."
        raise NotPossible(HookError(message, "Use an environment that has one, or another way.", SETTINGS))
    kept = kept_folder(environ)
    name = hashlib.sha256(f"{package}\0{python}".encode()).hexdigest()[:16]
    folder = (kept or temporary) / f"{name}-{edition(package)}"
    program = folder / "bin" / "builder"
    if not (program.is_file() and has_hook(str(program), environ)):
        say(f"installing {package} with {python}")
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            message = f"The folder {folder} for BUILDER_PACKAGE cannot be made: {error.strerror}."
            raise NotPossible(HookError(message, "Set XDG_CACHE_HOME to another folder.", SETTINGS)) from error
        steps = ([python, "-m", "venv", "--clear", str(folder)],)
        steps += (
            [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package],
        )
        for argv in steps:
            done = subprocess.run(argv, env=environ, check=False, capture_output=True, text=True, errors="replace")
            if done.returncode:
                last = (done.stderr.strip() or done.stdout.strip() or "it says nothing").splitlines()[-1]
                message = f"BUILDER_PACKAGE cannot be installed: {one_line(last, 300)}."
                raise NotPossible(HookError(message, "Check the package index of pip, or use another way.", SETTINGS))
        if not has_hook(str(program), environ):
            raise NotPossible(HookError("BUILDER_PACKAGE has no `builder hook`.", "Name a newer one.", SETTINGS))
    if kept:
        remove_unused(kept, name, but=folder)
    return str(program)


def edition(package):
    """Return what changes when a package may have another content under the same name."""
    path = Path(package)
    if path.is_file():
        found = path.stat()
        text = f"{found.st_size} {found.st_mtime_ns}"
    elif re.fullmatch("[^/*]+==[^/*]+", package):
        text = "pinned"
    else:
        text = time.strftime("%Y-%m-%d", time.gmtime())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kept_folder(environ):
    """Return the folder whose environments are kept for the next time; None if there can be none.

    What somebody else can write to is not used: a program there would get the credentials.
    """
    home = environ.get("HOME")
    cache = environ.get("XDG_CACHE_HOME") or (home and str(Path(home) / ".cache"))
    if not cache:
        return None
    folder = Path(cache) / "publish-hook"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        above, found = folder.parent.stat(), folder.lstat()
    except OSError as error:
        say(f"{folder} is not used, and nothing is kept for the next time: {error.strerror}")
        return None
    me = os.geteuid()
    replaceable = above.st_uid not in (0, me) or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX)
    if replaceable or not stat.S_ISDIR(found.st_mode) or found.st_uid != me or found.st_mode & 0o022:
        say(f"{folder} is not used, and nothing is kept for the next time: others than this user can change it")
        return None
    return folder


def remove_unused(kept, name, *, but):
    """Remove the environments of a package that nobody has begun to use for a day, but the one that is used now."""
    try:
        os.utime(str(but))
        for each in kept.glob(f"{name}-*"):
            if each != but and each.lstat().st_mtime < time.time() - DAY:
                shutil.rmtree(str(each))
    except OSError as error:
        say(f"earlier environments in {kept} cannot be removed: {error.strerror}")


def python_at(version):
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == version:
        return sys.executable
    return shutil.which(f"python{version}")


# ---- the second way: the listener


def listener(run):
    url, secret = run.environ.get("LISTENER_URL", "").rstrip("/"), run.environ.get("SUBMIT_SECRET", "").split()
    if not (url and secret):
        names = [name for name, there in (("LISTENER_URL", url), ("SUBMIT_SECRET", secret)) if not there]
        raise NotPossible(missing(*names))

    def ask(path, asked, seconds):
        return patiently(lambda: signed(url, path, secret[0], asked, run.environ.get("SSL_CERT_FILE")), seconds)

    try:
        job = ask("publish", {"model": run.model, "version": run.version}, 30)
    except HookError as error:
        if error.code in (AWAY, REFUSED, SETTINGS):
            raise NotPossible(error) from error
        raise
    about = {"model": job.get("model"), "version": job.get("version"), "job": job.get("job"), "uid": job.get("uid")}
    run.version, run.job = str(about["version"]), str(about["job"])
    run.taken()
    until = time.monotonic() + run.timeout
    while True:
        began = time.monotonic()
        try:
            wait = math.ceil(max(min(HELD, until - began), 0))
            outcome = ask("outcome", {**about, "wait": wait}, 240)
        except HookError as error:
            raise HookError(f"{error.what} The Job {run.job} goes on.", error.remedy, AGAIN) from error
        if outcome.get("state") in FINAL:
            break
        run.waits(": ".join(str(outcome[each]) for each in ("state", "error") if outcome.get(each)))
        if time.monotonic() >= until:
            raise out_of_time(run, "Look at it: builder status; or run the hook again.")
        time.sleep(max(0, 1 - (time.monotonic() - began)))
    if outcome["state"] == "failed":
        code = outcome.get("exit_code")
        raise HookError(outcome.get("error") or "The Job failed.", outcome.get("remedy") or "", code or DEFECT)
    return {**outcome, "how": "listener"}


def signed(url, path, secret, asked, ca):
    """Send one request, signed as Standard Webhooks are, and return the JSON of its answer."""
    body, identity, now = json.dumps(asked).encode(), str(uuid.uuid4()), str(int(time.time()))
    digest = hmac.new(secret.encode(), f"{identity}.{now}.".encode() + body, hashlib.sha256).digest()
    headers = {
        "Content-Type": "application/json",
        "webhook-id": identity,
        "webhook-timestamp": now,
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }
    status, content = request("POST", f"{url}/{path}", what="listener", headers=headers, body=body, ca=ca)
    found = parsed(content)
    if status == 200 and found:
        return found
    if isinstance(found.get("exit_code"), int) and found["exit_code"] > 0 and found.get("error"):
        raise HookError(str(found["error"]), str(found.get("remedy") or ""), found["exit_code"])
    if status == 401:
        remedy = "SUBMIT_SECRET has to be the listener's own, and this machine's clock right to five minutes."
        raise HookError("The listener refuses the signature (401).", remedy, REFUSED)
    if status in (404, 405):
        remedy = "Set SUBMIT_SECRET at the listener, or correct LISTENER_URL."
        raise HookError(f"The listener takes no requests at /{path} ({status}).", remedy, SETTINGS)
    raise HookError(f"The listener answered /{path} with status {status}.", "Look at its log.", AWAY)


# ---- the third way: the Kubernetes API


class Kubernetes:
    """The Kubernetes API: Jobs, their templates and their Pods, in one namespace."""

    def __init__(self, environ, namespace):
        account = environ.get("KUBE_ACCOUNT_DIR") or str(ACCOUNT)
        self.token_file = None
        self.token = environ.get("KUBE_TOKEN", "")
        own = ""
        if environ.get("KUBE_API_URL"):
            self.url, self.ca = environ["KUBE_API_URL"].rstrip("/"), environ.get("KUBE_CA")
        elif environ.get("KUBERNETES_SERVICE_HOST") and (Path(account) / "token").is_file():
            host, port = environ["KUBERNETES_SERVICE_HOST"], environ.get("KUBERNETES_SERVICE_PORT", "443")
            self.url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
            self.token_file, self.ca = Path(account) / "token", str(Path(account) / "ca.crt")
            own = (Path(account) / "namespace").read_text(encoding="utf-8").strip()
        else:
            message = "No cluster can be reached: this run has no service account, and KUBE_API_URL is not set."
            raise HookError(message, "Set KUBE_API_URL, KUBE_TOKEN and KUBE_CA.", SETTINGS)
        self.namespace = namespace or environ.get("KUBE_NAMESPACE") or own or "builder"

    def ask(self, method, kind, name="", body=None, query=""):
        """Return status and JSON of an answer; an API server that is away, or refuses, is an error."""
        group = "/apis/batch/v1" if kind in ("jobs", "cronjobs") else "/api/v1"
        path = "/".join(["", "namespaces", *(quote(part, safe="") for part in (self.namespace, kind, name) if part)])
        # A token in a file is renewed there.
        token = self.token_file.read_text(encoding="utf-8").strip() if self.token_file else self.token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        content = None
        if body is not None:
            content, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        status, answer = request(
            method,
            f"{self.url}{group}{path}{query}",
            what="Kubernetes API",
            headers=headers,
            body=content,
            ca=self.ca,
            direct=True,
        )
        found = parsed(answer)
        if status < 300 or status in (404, 409):
            return status, found
        what = (
            f"The Kubernetes API did not {method} {kind} {name} in {self.namespace} ({status}): {found.get('message')}."
        )
        if status in (401, 403) and "exceeded quota" not in what:
            raise HookError(what, "Check the account, its role, and the policies of the namespace.", REFUSED)
        raise HookError(what, "Try again when it answers.", AWAY if status >= 500 or status == 429 else AGAIN)

    def found(self, kind, name):
        status, found = self.ask("GET", kind, name)
        return found if status < 300 else None


def cluster(run):
    try:
        kube = Kubernetes(run.environ, run.namespace)
        mlflow = Mlflow(run.environ)
        version = mlflow.find(run.model, run.version)
        target = target_of(run.environ.get("TARGET_TAG") or DEFAULT_TAG)
        name = job_name(target, version)
        there = kube.found("jobs", name)
        method = method_of(mlflow, version, run.environ)
        template = template_of(kube, method)
    except HookError as error:
        if error.code in (AWAY, REFUSED, SETTINGS):
            raise NotPossible(error) from error
        raise
    run.version, run.job = str(version["version"]), name
    job = there if there and state_of(there) == "active" else created(kube, job_of(template, version, target), there)
    run.taken()
    return {**followed(run, kube, job), "how": "cluster"}


def template_of(kube, method):
    template = kube.found("cronjobs", TEMPLATES[method])
    if template is None:
        message = f"The namespace {kube.namespace} has no template {TEMPLATES[method]}."
        raise HookError(message, "Install it: kubectl apply -k k8s/base (or k8s/dockerfile).", SETTINGS)
    return template


def target_of(tag):
    return re.sub("^external_target_", "", tag.lower()) or tag.lower()


def method_of(mlflow, version, environ):
    """Return the method of a version: `dockerfile` where it has one, in the run that logged it."""
    if environ.get("BUILD_METHOD") in TEMPLATES:
        return environ["BUILD_METHOD"]
    tags = tags_of(version)
    if tags.get("MODEL_DOCKERFILE", "").strip().lower() == "none" or not version.get("run_id"):
        return "wheels"
    folder = tags.get("MODEL_TEMPLATES_FOLDER", "").strip().strip("/") or "templates"
    try:
        found = mlflow.ask("GET", "artifacts/list", run_id=version["run_id"], path=folder).get("files") or []
    except HookError as error:
        if error.code != NO_INPUT:
            raise
        found = []
    paths = {each.get("path") for each in found}
    return "dockerfile" if paths & {f"{folder}/Dockerfile.template", f"{folder}/Dockerfile.j2"} else "wheels"


def ascii_of(text):
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def job_name(target, version):
    """Return the name of a version's Job, which is the lock: the same as `builder submit` gives it."""
    name, number = version["name"], str(version["version"])
    whole = f"{target}\0{name}\0{number}".encode("utf-8", "surrogatepass")
    slug = re.sub("[^a-z0-9]+", "-", ascii_of(name).lower())[:24].strip("-") or "model"
    return f"publish-{slug}-v{number}-{hashlib.sha256(whole).hexdigest()[:10]}"


def label(text):
    return re.sub("[^A-Za-z0-9._-]", "-", ascii_of(text))[:63].strip("-._") or "model"


def source_id(version):
    """Return the hash of what decides whether the image has to be made again."""
    tags = tags_of(version)
    inputs = sorted((name, tags[name]) for name in INPUT_TAGS if name in tags)
    created_ms, source = int(version.get("creation_timestamp") or 0), version.get("source") or ""
    what = [
        LAYOUT_VERSION,
        version["name"],
        str(version["version"]),
        created_ms,
        source,
        version.get("run_id") or "",
        inputs,
    ]
    return hashlib.sha256(json.dumps(what, ensure_ascii=True).encode()).hexdigest()


def job_of(template, version, target):
    """Return the Job of a version: a copy of the template, with the version's names; policies admit nothing else."""
    name, number = version["name"], str(version["version"])
    found = copy.deepcopy(template["spec"]["jobTemplate"])
    labels = {"builder/target": label(target), "builder/model": label(name), "builder/version": number}
    named = {"builder/model-name": name, "builder/model-version": number}
    own, pod = found.get("metadata") or {}, found["spec"]["template"].setdefault("metadata", {})
    pod.pop("creationTimestamp", None)
    pod["labels"] = {**(pod.get("labels") or {}), **labels}
    pod["annotations"] = {**(pod.get("annotations") or {}), **named}
    about = {**named, "builder/target": target, "builder/source-id": source_id(version)}
    metadata = {
        "name": job_name(target, version),
        "labels": {**(own.get("labels") or {}), **labels},
        "annotations": {**(own.get("annotations") or {}), **about},
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": found["spec"]}


def state_of(job):
    if job["metadata"].get("deletionTimestamp"):
        return "deleted"
    told = {each["type"] for each in job.get("status", {}).get("conditions") or [] if each["status"] == "True"}
    return "complete" if "Complete" in told else "failed" if "Failed" in told else "active"


def created(kube, body, there):
    """Create a Job, and return it; one of its name that has ended is deleted before, one that runs is returned."""
    name = body["metadata"]["name"]
    known = there["metadata"]["uid"] if there else ""
    for _ in range(60):
        if there and state_of(there) != "deleted":
            only = {"propagationPolicy": "Background", "preconditions": {"uid": there["metadata"]["uid"]}}
            kube.ask("DELETE", "jobs", name, only)
        status, made = kube.ask("POST", "jobs", body=body)
        if status < 300:
            return made
        if status == 404:
            raise HookError(f"There is no namespace {kube.namespace}.", "Name another one.", SETTINGS)
        there = kube.found("jobs", name)
        if there and state_of(there) != "deleted" and there["metadata"]["uid"] != known:
            return there
        time.sleep(1)
    raise HookError(f"The Job {name} cannot be made: the one before it does not go.", "See who holds it.", AGAIN)


def followed(run, kube, job):
    """Return the outcome of a Job, once it has ended."""
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    until = time.monotonic() + run.timeout
    query = "?" + urlencode({"labelSelector": f"batch.kubernetes.io/controller-uid={uid}"})
    while time.monotonic() < until:
        try:
            now = patiently(lambda: kube.found("jobs", name), 120)
            _, listed = patiently(lambda: kube.ask("GET", "pods", query=query), 120)
        except HookError as error:
            raise HookError(f"{error.what} The Job {name} goes on.", error.remedy, AGAIN) from error
        if now is None or now["metadata"]["uid"] != uid or state_of(now) == "deleted":
            raise HookError(f"The Job {name} was deleted while it ran.", "Run the hook again.", AGAIN)
        pods = sorted(listed.get("items") or [], key=lambda pod: pod["metadata"]["creationTimestamp"])
        last = pods[-1] if pods else None
        succeeded = state_of(now) == "complete" or (last and last["status"].get("phase") == "Succeeded")
        if succeeded or state_of(now) == "failed":
            return outcome_of(name, now, last, succeeded=bool(succeeded))
        run.waits(why_waiting(last))
        time.sleep(LOOK)
    raise out_of_time(run, f"Look at it: kubectl -n {kube.namespace} logs job/{name}")


def statuses(pod):
    status = pod.get("status", {}) if pod else {}
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def why_waiting(pod):
    """Return the state of a Pod, and why a container of it waits."""
    if pod is None:
        return "pending: it has no Pod yet"
    reasons = [(each.get("state") or {}).get("waiting") or {} for each in statuses(pod)]
    told = next(
        (each for each in reasons if each.get("reason") not in (None, "PodInitializing", "ContainerCreating")), {}
    )
    phase = str(pod["status"].get("phase", "")).lower()
    return f"{phase}: {told['reason']} {told.get('message', '')}" if told else phase


def outcome_of(name, job, pod, *, succeeded):
    """Return the outcome that the containers of a Pod have left, or raise what ended it."""
    code = 0
    told = {}
    for each in statuses(pod):
        ended = (each.get("state") or {}).get("terminated") or {}
        # A Dockerfile's steps can write the message of `build`: that is not believed.
        found = parsed(ended.get("message") or "") if each["name"] in OURS else {}
        if ended.get("exitCode") and not code:
            code, told = ended["exitCode"], found
            break
        if each["name"] in ("push", "publish"):
            told = found
    if succeeded:
        platforms = told.get("platforms") if isinstance(told.get("platforms"), list) else []
        image = str(told.get("image") or "")
        return {"state": "published" if image else "foreign", "image": image, "platforms": platforms}
    conditions = job.get("status", {}).get("conditions") or []
    why = next((f"{each.get('reason')}: {each.get('message')}" for each in conditions if each["type"] == "Failed"), "")
    what = re.sub("^[A-Za-z]+: ", "", str(told.get("error") or ""), count=1) or f"The Job {name} has failed ({why})."
    known = (64, 65, 66, 69, 70, 73, 75, 77, 78)
    raise HookError(what, f"Its log tells more: kubectl logs job/{name}", code if code in known else AGAIN)


# ---- all together


class Run:
    """One version on its way."""

    def __init__(self, model, version, environ, namespace, timeout):
        self.model, self.version, self.environ = model, version, environ
        self.namespace, self.timeout = namespace, timeout
        self.how, self.job, self.refused, self.said = "", "", {}, ""

    def taken(self):
        why = "".join(f"; not {how}: {error.what}" for how, error in self.refused.items())
        say(f"publishing {self.model} version {self.version} by {self.how}{f' as {self.job}' if self.job else ''}{why}")

    def waits(self, state):
        if state != self.said:
            say(f"the Job {self.job} is {state}")
        self.said = state


def first_possible(run, ways):
    """Publish in the first way that is possible, and return the outcome."""
    for how in ways:
        run.how = how
        try:
            return {"here": here, "listener": listener, "cluster": cluster}[how](run)
        except NotPossible as reason:
            run.refused[how] = reason.error
    run.how = ""
    errors = list(run.refused.values())
    if len(errors) == 1:
        raise errors[0]
    code = next((code for code in (AWAY, REFUSED) if any(error.code == code for error in errors)), SETTINGS)
    what = " ".join(f"{how}: {error.what}" for how, error in run.refused.items())
    remedy = "Make one of the ways possible; docs/domino.md describes them."
    raise HookError(f"The version cannot be published from here: {what}", remedy, code)


def publish(model=None, version=None, *, how=None, namespace="", stats=None, result=None, environ=None, timeout=7200):
    """Publish one version, and return what came of it: state, image, digest, platforms, seconds, how, job.

    Args:
        model: the registered model; MODEL_NAME, or the newest selected version of this run, if it is not given.
        version: its version: a number, or an alias such as "@champion".
        how: "here", "listener" or "cluster"; the first that is possible if it is not given.
        namespace: of the Jobs in Kubernetes.
        stats: file for Domino's dashboard; dominostats.json in DOMINO_WORKING_DIR if it is not given.
        result: file for what came of it, as JSON.
        environ: the environment, if it is not the process's own.
        timeout: seconds to follow a Job in Kubernetes.

    Raises:
        HookError: what failed; its `code` is the publisher's exit code.
    """
    environ = dict(os.environ if environ is None else environ)
    began = time.monotonic()
    run = Run(model or "", str(version or ""), environ, namespace, timeout)
    outcome, failed, ended = {"state": "failed"}, None, None
    try:
        if not (model or version):
            run.model, run.version = environ.get("MODEL_NAME", ""), environ.get("MODEL_VERSION", "")
        run.model, run.version = named_version(run.model, run.version, environ)
        outcome = first_possible(run, [how] if how else WAYS)
    except HookError as error:
        failed, outcome = error, {"state": error.state}
    except Exception as error:  # noqa: BLE001  # whatever it is, word of it is left
        failed = HookError(f"The hook broke off: {type(error).__name__}: {error}.", "Please report it.", DEFECT)
    except (Ended, KeyboardInterrupt) as error:
        goes_on = f" The Job {run.job} goes on." if run.job else ""
        outcome, ended = {"state": "running" if goes_on else "failed"}, error
        failed = HookError(f"The hook was ended by a signal.{goes_on}", "Run it again.", AGAIN)
    image = str(outcome.get("image") or "") if outcome["state"] == "published" else ""
    found = {
        "state": outcome["state"],
        "image": image,
        "digest": image.partition("@")[2],
        "platforms": [str(each) for each in outcome.get("platforms") or []],
        "seconds": round(time.monotonic() - began, 1),
        "model": run.model,
        "version": str(outcome.get("version") or run.version),
        "how": run.how,
        "job": str(outcome.get("job") or run.job),
        "exit_code": failed.code if failed else 0,
        "error": failed.what if failed else "",
        "remedy": failed.remedy if failed else "",
    }
    leave_word(found, environ, stats, result)
    if ended is not None:
        raise ended
    if failed is not None:
        failed.result = found
        raise failed
    took = f"{found['seconds']:g} s, {found['how']}"
    if found["state"] == "foreign":
        say(f"{run.model} version {found['version']} is left alone: its tag holds an image of others ({took})")
    else:
        say(
            f"{run.model} version {found['version']} is published for {', '.join(found['platforms'])}: {image} ({took})"
        )
    return found


def leave_word(found, environ, stats, result):
    """Write what came of it, for the dashboard and for programs."""
    columns = {name: found[name] for name in ("state", "image", "digest", "seconds")}
    columns["platforms"] = ",".join(found["platforms"])
    if found["error"]:
        columns.update(error=one_line(f"{found['error']} {found['remedy']}"), exit_code=found["exit_code"])
    folder = environ.get("DOMINO_WORKING_DIR")
    path = Path(stats) if stats else Path(folder) / STATS if folder else None
    problems = [add_stats(path, columns) if path else "", write_json(Path(result), found) if result else ""]
    for problem in filter(None, problems):
        say(f"what came of it is not written: {problem}")


@contextmanager
def ending():
    """Have SIGTERM end the hook in order, so that it leaves word."""

    def ended(_signal, _frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Ended

    before = signal.signal(signal.SIGTERM, ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Publish a registered model version out of a Domino run.")
    parser.add_argument("model", nargs="?", help="the registered model; else MODEL_NAME, or what this run registered")
    parser.add_argument("version", nargs="?", help="its version: a number, or an alias such as @champion")
    parser.add_argument("--how", choices=WAYS, help="the only way that may be taken")
    parser.add_argument("-n", "--namespace", default="", help="namespace of the Jobs in Kubernetes")
    parser.add_argument("--stats", help="file for the dashboard, in place of dominostats.json")
    parser.add_argument("--result", help="file for what came of it, as JSON")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds to follow a Job in Kubernetes")
    try:
        asked = parser.parse_args(arguments)
    except SystemExit as error:
        return USAGE if error.code else 0
    try:
        with ending():
            found = publish(**vars(asked))
    except HookError as error:
        say(f"error: {error.what}")
        say(f"what to do: {error.remedy}")
        return error.code
    except (Ended, KeyboardInterrupt):
        say("error: it was ended by a signal")
        return AGAIN
    if found["image"]:
        print(found["image"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
