# A device on a Jetson Thor with JetPack 7 (L4T r38; Python 3.12, CUDA 13). There is no l4t-jetpack image for it: Thor runs
# NVIDIA's images for ARM servers, here one with PyTorch and TensorRT. Build it in the repository, on the Jetson:
#   docker build -f examples/containers/jetpack7.Dockerfile -t ssd-edge:jetpack7 .
#   docker run --runtime nvidia -v ssd-edge:/var/lib/ssd-edge -v "$PWD:/data:ro" ssd-edge:jetpack7 doctor
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY ssd_edge ssd_edge/
COPY exporters exporters/
COPY device_runtime device_runtime/
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvcr.io/nvidia/pytorch:25.08-py3
# The image's PyTorch and TensorRT stay: the venv sees them. ONNX Runtime of PyPI has no GPU for ARM; it tries new graphs.
# The imports fail here, not at the first start, if a package of NVIDIA's is missing.
ENV PATH=/opt/ssd-edge/bin:$PATH
# hadolint ignore=DL3008
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --system-site-packages /opt/ssd-edge \
    && pip install --no-cache-dir "$(ls /wheels/*.whl)[predict]" \
    && python -c "import onnxruntime, ssd_edge, tensorrt, torch; assert torch.version.cuda" \
    && useradd --system --uid 10001 --groups video --home-dir /var/lib/ssd-edge ssd-edge \
    && install -d -o ssd-edge -g ssd-edge -m 750 /var/lib/ssd-edge
ENV SSD_EDGE_ROOT=/var/lib/ssd-edge \
    CUDA_CACHE_PATH=/var/lib/ssd-edge/cuda \
    OMP_WAIT_POLICY=PASSIVE
VOLUME /var/lib/ssd-edge
USER 10001
WORKDIR /var/lib/ssd-edge
# Unhealthy until a bundle is installed, which may build an engine for minutes.
HEALTHCHECK --interval=60s --timeout=20s --start-period=30s CMD ["ssd-edge", "device", "status"]
ENTRYPOINT ["ssd-edge"]
CMD ["device", "status"]
