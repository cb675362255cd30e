# A device on a Jetson Orin with JetPack 6.1 or 6.2 (L4T r36.4; Python 3.10, CUDA 12.6, TensorRT 10.3). Build it in the
# repository, on the Jetson:
#   docker build -f examples/containers/jetpack6.Dockerfile -t ssd-edge:jetpack6 .
#   docker run --runtime nvidia -v ssd-edge:/var/lib/ssd-edge -v "$PWD:/data:ro" ssd-edge:jetpack6 doctor
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY ssd_edge ssd_edge/
COPY exporters exporters/
COPY device_runtime device_runtime/
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0
# PyTorch and ONNX Runtime that are built for the GPU of JetPack 6; those of PyPI are not.
ARG WHEELS=https://pypi.jetson-ai-lab.io/jp6/cu126/+simple/
ARG TORCH=2.8.0
ARG ONNXRUNTIME=1.23.0
ENV PATH=/opt/ssd-edge/bin:$PATH
# The imports fail here, not at the first start, if a package of NVIDIA's is missing.
# hadolint ignore=DL3008
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    apt-get update \
    && apt-get install -y --no-install-recommends python3-venv python3-libnvinfer \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --system-site-packages /opt/ssd-edge \
    && pip install --no-cache-dir --index-url "$WHEELS" "torch==$TORCH" "onnxruntime-gpu==$ONNXRUNTIME" \
    && pip install --no-cache-dir "cryptography>=42" /wheels/*.whl \
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
