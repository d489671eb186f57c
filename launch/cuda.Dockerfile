# The server on NVIDIA GPUs (driver of CUDA 13, NVIDIA's container toolkit on the host).
#   docker build -f launch/cuda.Dockerfile -t weaveinf:cuda .
#   docker run --rm --gpus all --shm-size 2g --stop-timeout 90 -p 127.0.0.1:8000:8000 \
#     -v /path/to/model:/model:ro -v /path/to/keys:/run/secrets/weaveinf_keys:ro weaveinf:cuda \
#     serve /model --tp 8 --host 0.0.0.0 --api-key-file /run/secrets/weaveinf_keys
# Keys: one a line, readable by user 10001. In production pin the two base images by digest.

# No image of CUDA's is needed: PyPI's torch brings the libraries, NVRTC among them, and the host the driver.
FROM python:3.11.14-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ONLY_BINARY=:all:
RUN python -m venv /opt/weaveinf
ENV PATH=/opt/weaveinf/bin:$PATH
WORKDIR /src
COPY . .
# One index only: where two are asked, the second may hold a stranger's package of the same name. torch
# names the exact versions of CUDA's libraries, NCCL and Triton; the rest has the lock's.
RUN pip install --index-url https://pypi.org/simple --constraint requirements.lock setuptools \
    && pip install --index-url https://pypi.org/simple --constraint requirements.lock --no-build-isolation \
        torch==2.13.0 cupy-cuda13x==14.2.0 cuda-pathfinder==1.9.1 ".[ray,structured,cu13]" \
    && pip check

FROM python:3.11.14-slim-bookworm
# Triton compiles the C function that starts a kernel when it is first wanted, so here a C compiler stays.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home weaveinf
COPY --from=build /opt/weaveinf /opt/weaveinf
# Kernels are compiled once and kept in the home; mount a volume there to keep them longer.
ENV PATH=/opt/weaveinf/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /home/weaveinf
EXPOSE 8000
# Until it has loaded it is starting, thirty minutes at most.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 CMD \
    ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# The server is process 1, so `docker stop` sends it the SIGTERM on which it drains.
ENTRYPOINT ["weaveinf"]
# All of the container's interfaces, as its loopback cannot be published; hence the key.
CMD ["serve", "/model", "--host", "0.0.0.0", "--api-key-file", "/run/secrets/weaveinf_keys"]
