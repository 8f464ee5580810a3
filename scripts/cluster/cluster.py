"""A cluster as tests and the demo use it, wherever it runs."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.launch import clean_environ

# Where the API server is too busy to take a connection, nothing was asked of it yet.
_NOTHING_SENT = ("TLS handshake timeout", "connect: connection refused")
# Where it lost one, or etcd was too busy, something may have been done: what can be asked twice is.
_PERHAPS_DONE = (
    "etcdserver: request timed out",
    "etcdserver: leader changed",
    "etcdserver: too many requests",
    "rpc error: code = Unavailable",
    "unexpected EOF",
    "http2: client connection lost",
    "connection reset by peer",
)
_ASKED_TWICE = frozenset({"apply", "auth", "get", "label", "logs", "scale", "wait"})
_BUSY_SECONDS = 120
_PAUSE_SECONDS = 1
# For a whole publish on a machine that has much else to do.
_LONG_SECONDS = 800


class NoCluster(Exception):
    """No cluster can run on this machine; the message says why."""


class KubectlFailed(Exception):
    """A command of kubectl failed; what it printed is the message."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that runs.

    Attributes:
        folder: of everything that it writes; gone with it.
        kubectl_path: of kubectl, as old as the cluster.
        kubeconfig: its administrator's.
        node: the name of its only node.
        address: the IP address where Pods reach servers that this machine runs, and the API server's.
        server: the API server's URL.
        ca: the certificate of its authority.
        environ: variables for its clients.
    """

    folder: Path
    kubectl_path: Path
    kubeconfig: Path
    node: str
    address: str
    server: str
    ca: Path
    environ: Mapping[str, str]

    def kubectl(
        self,
        *arguments: str,
        documents: Sequence[Mapping[str, Any]] = (),
        kubeconfig: Path | None = None,
        timeout: float = _LONG_SECONDS,
        patient: bool = True,
    ) -> str:
        """Run kubectl, and return what it prints.

        Args:
            arguments: its own.
            documents: objects for its stdin, where `arguments` have `-f -`.
            kubeconfig: another user's; the administrator's where it is None.
            timeout: seconds after which it hangs.
            patient: ask again where the API server is too busy.

        Raises:
            KubectlFailed: with what it printed to stderr.
        """
        passing = _NOTHING_SENT
        verb = next((word for word in arguments if not word.startswith("-")), "")
        if verb in _ASKED_TWICE or "--dry-run=server" in arguments:
            passing += _PERHAPS_DONE
        lost_since = 0.0
        while True:
            done = subprocess.run(
                [str(self.kubectl_path), f"--kubeconfig={kubeconfig or self.kubeconfig}", *arguments],
                input=yaml.safe_dump_all(documents) if documents else "",
                check=False,
                capture_output=True,
                text=True,
                timeout=timeout,
                env=clean_environ(**self.environ),
            )
            lost = done.returncode and any(words in done.stderr for words in passing)
            lost_since = lost_since or time.monotonic()
            if not lost or not patient or time.monotonic() > lost_since + _BUSY_SECONDS:
                break
            time.sleep(_PAUSE_SECONDS)
        if done.returncode:
            message = f"kubectl {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            raise KubectlFailed(message)
        return done.stdout

    def get(self, *arguments: str) -> Any:
        """Return what `kubectl get … -o json` prints: an object, or the `items` of a list."""
        found = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found["items"] if found["kind"] == "List" else found

    def create(self, *documents: Mapping[str, Any], namespace: str = "default") -> list[str]:
        """Create objects, and return their names as `kind/name`."""
        printed = self.kubectl(f"--namespace={namespace}", "create", "-f", "-", "-o", "name", documents=documents)
        return printed.split()

    def watch(
        self,
        name: str,
        jsonpath: str,
        until: Collection[str],
        *,
        namespace: str = "default",
        timeout: float = _LONG_SECONDS,
    ) -> str:
        """Follow an object until an expression of it has one of some values, and return that value.

        One that is not there yet, or is replaced by another one of its name, is waited for.

        Args:
            name: of the object, as `job/publish-x`.
            jsonpath: the expression, as `{.status.phase}`.
            until: the values.
            namespace: of the object.
            timeout: seconds after which it hangs.

        Raises:
            KubectlFailed: no such value came in time.
        """
        kind, _, own = name.partition("/")
        what = (kind, f"--field-selector=metadata.name={own}", "-o", f'jsonpath={jsonpath}{{"\\n"}}')
        value = said = ""
        with closing(self.changes(*what, namespace=namespace, timeout=timeout)) as lines:
            try:
                for line in lines:
                    value = line.strip()
                    if value in until:
                        return value
            except KubectlFailed as error:
                said = str(error)
        message = f"{jsonpath} of {name} is {value!r} and became none of {', '.join(until)}: {said}"
        raise KubectlFailed(message)

    def changes(
        self, *arguments: str, namespace: str = "default", timeout: float = _LONG_SECONDS
    ) -> Generator[str, None, None]:
        """Yield the lines of `kubectl get … --watch`.

        One that the API server ends, or loses, is begun again: it starts with what there is.

        Args:
            arguments: of `kubectl get`.
            namespace: of the objects.
            timeout: seconds after which it hangs.

        Raises:
            KubectlFailed: that time is over, or it cannot be begun for long; with what kubectl said last.
        """
        said = ""
        deadline, lost_since = time.monotonic() + timeout, 0.0
        while (left := deadline - time.monotonic()) > 0:
            begun, heard = time.monotonic(), False
            with self.start_kubectl(f"--namespace={namespace}", "get", "--watch", *arguments) as process:
                timer = threading.Timer(left, process.kill)
                timer.start()
                try:
                    for line in process.stdout or ():
                        heard = True
                        yield line
                    said = process.stderr.read() if process.stderr else ""
                finally:
                    timer.cancel()
                    process.kill()
            ended = time.monotonic()
            lost_since = 0.0 if heard or ended > begun + _BUSY_SECONDS else lost_since or ended
            if lost_since and ended > lost_since + _BUSY_SECONDS:
                break
            time.sleep(_PAUSE_SECONDS)
        raise KubectlFailed(said)

    def start_kubectl(self, *arguments: str) -> subprocess.Popen[str]:
        """Start kubectl, as the administrator."""
        return subprocess.Popen(
            [str(self.kubectl_path), f"--kubeconfig={self.kubeconfig}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environ(**self.environ),
        )

    def account_kubeconfig(self, namespace: str, account: str) -> Path:
        """Return a kubeconfig with a token of a service account, for an hour, from the TokenRequest API."""
        token = self.kubectl(f"--namespace={namespace}", "create", "token", account).strip()
        return self.write_kubeconfig(f"{namespace}-{account}", {"token": token}, namespace=namespace)

    def write_kubeconfig(self, name: str, user: Mapping[str, str], namespace: str = "default") -> Path:
        """Write a kubeconfig for a user of the API server, and return its path."""
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "it", "cluster": {"server": self.server, "certificate-authority": str(self.ca)}}],
            "users": [{"name": "it", "user": dict(user)}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it", "namespace": namespace}}],
            "current-context": "it",
        }
        path = self.folder / f"{name.replace(':', '-')}.kubeconfig"
        path.write_text(yaml.safe_dump(document))
        path.chmod(0o600)
        return path

    def load_image(self, archive: Path) -> None:
        """Put the images of an archive onto the node, under the names that stand in it."""
        self.ctr("images", "import", str(archive))

    def remove_image(self, name: str) -> None:
        """Remove an image from the node."""
        self.ctr("images", "rm", "--sync", name)

    def ctr(self, *arguments: str) -> str:
        """Run containerd's own command for the node's containers and images, and return what it prints."""
        command = ["ctr", f"--address={self.folder / 'ctr' / 'containerd.sock'}", "--namespace=k8s.io"]
        command += [f"--connect-timeout={_BUSY_SECONDS}s", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def trust_registry(self, host: str) -> None:
        """Let the node pull from a registry at `ADDRESS:PORT` over plain HTTP; at once, without a restart."""
        folder = self.folder / "certs.d" / host
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts.toml").write_text(self.hosts(host))

    @staticmethod
    def hosts(host: str) -> str:
        """Return containerd's configuration of a registry over plain HTTP."""
        return f'server = "http://{host}"\n[host."http://{host}"]\n  capabilities = ["pull", "resolve"]\n'

    def requests(self) -> list[dict[str, Any]]:
        """Return the requests that users sent to the API server so far, as its audit log has them."""
        # What stands behind the last newline is being written.
        whole, _, _ = (self.folder / "audit.log").read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def log(self, program: str) -> str:
        """Return what one of its programs wrote, as `kubelet`."""
        return (self.folder / "logs" / f"{program}.log").read_text(errors="replace")
