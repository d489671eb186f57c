# The server on CPUs; also what the nodes of rayservice.yaml run.
#   docker build -f launch/cpu.Dockerfile -t weaveinf:cpu .
#   docker run --rm --read-only --tmpfs /tmp --shm-size 2g --stop-timeout 90 -p 127.0.0.1:8000:8000 \
#     -v /path/to/model:/model:ro -v /path/to/keys:/run/secrets/weaveinf_keys:ro weaveinf:cpu
# Keys: one a line, readable by user 10001. For other options name the whole command after the image:
#   serve /model --tp 2 --host 0.0.0.0 --api-key-file /run/secrets/weaveinf_keys
# In production pin the two base images by digest.

# The full image has the compiler that the kernels need, for the same Python; the slim one below has none.
FROM python:3.11.14-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ONLY_BINARY=:all:
RUN python -m venv /opt/weaveinf
ENV PATH=/opt/weaveinf/bin:$PATH
# Each command asks one index, never two: where two are asked, the second may hold a stranger's package
# of the same name. torch without CUDA has an index of its own; all else is PyPI's, at the lock's versions.
RUN pip install --index-url https://download.pytorch.org/whl/cpu --no-deps torch==2.13.0+cpu
WORKDIR /src
COPY . .
RUN pip install --index-url https://pypi.org/simple --constraint requirements.lock setuptools \
    && pip install --index-url https://pypi.org/simple --constraint requirements.lock --no-build-isolation \
        triton==3.6.0 ".[ray,structured]" \
    && pip check

FROM python:3.11.14-slim-bookworm
RUN useradd --uid 10001 --create-home weaveinf
COPY --from=build /opt/weaveinf /opt/weaveinf
# What is measured once is kept in the cache.
ENV PATH=/opt/weaveinf/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/tmp/cache HF_HUB_OFFLINE=1
USER 10001:10001
WORKDIR /home/weaveinf
EXPOSE 8000
# Until it has loaded it is starting, ten minutes at most.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD \
    ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# The server is process 1, so `docker stop` sends it the SIGTERM on which it drains.
ENTRYPOINT ["weaveinf"]
# All of the container's interfaces, as its loopback cannot be published; hence the key.
CMD ["serve", "/model", "--host", "0.0.0.0", "--api-key-file", "/run/secrets/weaveinf_keys"]
