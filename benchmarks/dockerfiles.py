"""The Dockerfiles of the rivals."""

from __future__ import annotations

from benchmarks.environments import Environment
from benchmarks.site import UV_IMAGE

_SERVER = '["python", "-m", "uvicorn", "mlflow.pyfunc.scoring_server.app:app", "--host", "0.0.0.0", "--port", "8080"]'


def plain(environment: Environment, base: str) -> str:
    """Return one in the usual order: the model first, so that every new version installs all again.

    Packages are installed as such files do it, so what pip caches stays in the image.
    """
    copied = ["COPY mymodel /app/mymodel", *_client(environment)]
    install = "RUN pip install -r /app/mymodel/requirements.txt"
    return "\n".join([f"FROM {base}", *copied, install, *_rest(environment)])


def tuned(environment: Environment, base: str, cache: str) -> str:
    """Return the best that BuildKit can do: dependencies first, by uv, with a cache mount, and bytecode compiled.

    Args:
        environment: what is served.
        base: the base image.
        cache: name of the cache mount; a new one is empty.
    """
    mounts = [
        f"--mount=type=cache,id={cache},target=/cache",
        f"--mount=type=bind,from={UV_IMAGE},target=/tools",
        "--mount=type=bind,source=mymodel/requirements.txt,target=/requirements.txt",
    ]
    # The cache is another file system, so that linking would fail and warn.
    install = (
        f"RUN {' '.join(mounts)} export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt UV_CACHE_DIR=/cache"
        " UV_LINK_MODE=copy && /tools/uv venv --quiet /opt/venv"
        " && /tools/uv pip install --quiet --compile-bytecode --python /opt/venv -r /requirements.txt"
    )
    copied = ["ENV PATH=/opt/venv/bin:$PATH", "COPY mymodel /app/mymodel", *_client(environment)]
    return "\n".join([f"FROM {base}", install, *copied, *_rest(environment)])


def _client(environment: Environment) -> list[str]:
    return ["COPY client /app/client"] if environment.client else ["ENV __pyfunc_model_path__=/app/mymodel"]


def _rest(environment: Environment) -> list[str]:
    command = '["python", "/app/client/app.py"]' if environment.client else _SERVER
    return ["ENV HOME=/tmp", "WORKDIR /app", "USER 10001", "EXPOSE 8080", f"CMD {command}", ""]
