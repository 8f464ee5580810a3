# The builder image: Kaniko, and under /kaniko everything that the builder needs. docs/kubernetes.md says how to use it,
# docs/decisions/0006-everything-under-kaniko.md why it looks like this.
#
#   docker build -t builder .
#   docker build -t builder-without-engine --build-arg KANIKO_IMAGE=scratch --build-arg BUILDER_USER=65532 .
#
# Behind a proxy with its own CA, or with a private index: put the CA bundle at docker/ca-bundle.pem and a
# pip.conf at docker/pip.conf. Git ignores both, only the build stage uses them, and the image has neither.
#
# Images are pinned by the digest of their index, since a tag can move. `crane digest NAME:TAG` prints a new one; see
# docs/decisions/0034-pinned-images.md.
ARG KANIKO_IMAGE=ghcr.io/osscontainertools/kaniko:v1.28.3@sha256:779f463aaa3219151ceff518249aa043a60bcb09a17fab58b915f63c678ecde6
ARG PYTHON_IMAGE=docker.io/library/python:3.12.14-slim-trixie@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea
# Interpreters that only compile: wheel layers have bytecode of the model's Python, whatever the builder's own is. Where
# one cannot be had, name PYTHON_IMAGE in its place. See docs/decisions/0054-compilers.md.
ARG PYTHON_3_9_IMAGE=docker.io/library/python:3.9-slim@sha256:2d97f6910b16bd338d3060f261f53f144965f755599aab1acda1e13cf1731b1b
ARG PYTHON_3_10_IMAGE=docker.io/library/python:3.10-slim-trixie@sha256:fd76ade0c607f27677bc04be3c60749f400eedc941d9e72967e19a4cedff80c2
ARG PYTHON_3_11_IMAGE=docker.io/library/python:3.11-slim-trixie@sha256:9534e5a8e315485d4061ed659af0fd78a284c015f9b73661b41d6bab25604534
ARG PYTHON_3_12_IMAGE=docker.io/library/python:3.12.14-slim-trixie@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea
ARG PYTHON_3_13_IMAGE=docker.io/library/python:3.13-slim-trixie@sha256:9d2e5553305c7c7b0097999bb17187c69b921ccd6bc9d40e4bb5ebe652c00285
ARG PYTHON_3_14_IMAGE=docker.io/library/python:3.14-slim-trixie@sha256:51dafde81dbdb6ebde285137a295cf18a47ca95234fe388a343719cb97305b3d

FROM ${PYTHON_3_9_IMAGE} AS compiler-3.9
COPY docker/compiler.py builder/wheels/bytecode.py /build/
RUN ["python3", "/build/compiler.py", "/compilers", "3.9", "/build/bytecode.py"]

FROM ${PYTHON_3_10_IMAGE} AS compiler-3.10
COPY docker/compiler.py builder/wheels/bytecode.py /build/
RUN ["python3", "/build/compiler.py", "/compilers", "3.10", "/build/bytecode.py"]

FROM ${PYTHON_3_11_IMAGE} AS compiler-3.11
COPY docker/compiler.py builder/wheels/bytecode.py /build/
RUN ["python3", "/build/compiler.py", "/compilers", "3.11", "/build/bytecode.py"]

FROM ${PYTHON_3_12_IMAGE} AS compiler-3.12
COPY docker/compiler.py builder/wheels/bytecode.py /build/
RUN ["python3", "/build/compiler.py", "/compilers", "3.12", "/build/bytecode.py"]

FROM ${PYTHON_3_13_IMAGE} AS compiler-3.13
COPY docker/compiler.py builder/wheels/bytecode.py /build/
RUN ["python3", "/build/compiler.py", "/compilers", "3.13", "/build/bytecode.py"]

FROM ${PYTHON_3_14_IMAGE} AS compiler-3.14
COPY docker/compiler.py builder/wheels/bytecode.py /build/
RUN ["python3", "/build/compiler.py", "/compilers", "3.14", "/build/bytecode.py"]

FROM ${PYTHON_IMAGE} AS python
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
WORKDIR /build
COPY docker/ docker/
RUN if [ -f docker/pip.conf ]; then cp docker/pip.conf /etc/pip.conf; fi \
 && if [ -f docker/ca-bundle.pem ]; then export PIP_CERT=/build/docker/ca-bundle.pem; fi \
 && python3 -m pip install -q --target tools --require-hashes --only-binary :all: -r docker/requirements.txt
RUN export PATH="/build/tools/bin:$PATH" \
 && python3 docker/relocate.py python /kaniko \
 && python3 docker/relocate.py certificates /kaniko \
 && /kaniko/python/bin/python3 -m venv --without-pip /kaniko/venv \
 && mkdir /kaniko/bin /kaniko/builder /kaniko/compilers /kaniko/workspace /kaniko/tmp \
 && chmod 1777 /kaniko/workspace /kaniko/tmp
COPY --from=compiler-3.9 /compilers/ /kaniko/compilers/
COPY --from=compiler-3.10 /compilers/ /kaniko/compilers/
COPY --from=compiler-3.11 /compilers/ /kaniko/compilers/
COPY --from=compiler-3.12 /compilers/ /kaniko/compilers/
COPY --from=compiler-3.13 /compilers/ /kaniko/compilers/
COPY --from=compiler-3.14 /compilers/ /kaniko/compilers/
RUN PATH="/build/tools/bin:$PATH" python3 docker/relocate.py compilers /kaniko
# Packages come before our own code, so that a change to the code does not invalidate this layer.
COPY requirements/builder.txt requirements/
RUN if [ -f docker/ca-bundle.pem ]; then export PIP_CERT=/build/docker/ca-bundle.pem; fi \
 && python3 -m pip --python /kaniko/venv/bin/python3 install -q --require-hashes --only-binary :all: --no-compile \
      -r requirements/builder.txt \
 && python3 docker/lean.py prune /kaniko \
 && PATH="/build/tools/bin:$PATH" python3 docker/relocate.py libraries /kaniko \
 && /kaniko/venv/bin/python3 -I -B docker/relocate.py check /kaniko
COPY pyproject.toml LICENSE README.md ./
COPY builder/ builder/
COPY templates/ templates/
RUN PYTHONPATH=/build/tools python3 -m pip --python /kaniko/venv/bin/python3 install -q --no-deps --no-build-isolation \
      --no-compile . \
 && /kaniko/venv/bin/python3 -I -B docker/lean.py imported > imported.txt \
 && PYTHONHASHSEED=0 /kaniko/venv/bin/python3 -s -B -m compileall -q --invalidation-mode unchecked-hash -i imported.txt \
 && printf '#!/kaniko/venv/bin/python3 -I\nfrom builder.__main__ import main\nmain()\n' > /kaniko/bin/builder \
 && chmod 755 /kaniko/bin/builder \
 && du -sk /kaniko/python /kaniko/lib /kaniko/venv

FROM ${KANIKO_IMAGE}
COPY --from=python /kaniko/ /kaniko/
# TMPDIR: there is no /tmp, and files that a build leaves there are deleted. SSL_CERT_FILE is left to the user.
ENV PATH=/kaniko/bin:/usr/local/bin:/kaniko \
    HOME=/kaniko/tmp \
    TMPDIR=/kaniko/tmp \
    LANG=C.UTF-8 \
    SSL_CERT_DIR=/kaniko/ssl/certs \
    DOCKER_CONFIG=/kaniko/.docker \
    WHEEL_COMPILERS=/kaniko/compilers
WORKDIR /kaniko/workspace
ARG VERSION=
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="model-image-builder" \
      org.opencontainers.image.description="Publishes registered MLflow models as container images" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
# Kaniko needs root; an image without it does not (--build-arg BUILDER_USER=65532).
ARG BUILDER_USER=0
USER ${BUILDER_USER}
ENTRYPOINT ["/kaniko/bin/builder"]
CMD ["publish"]
