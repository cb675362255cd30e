# A device on a PC or any board with a CPU of 64 bits, x86-64 or ARM. Build it in the repository:
#   docker build -f examples/containers/pc.Dockerfile --target predict -t ssd-edge:predict .
#   docker build -f examples/containers/pc.Dockerfile --target learn -t ssd-edge:learn .
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY ssd_edge ssd_edge/
COPY exporters exporters/
COPY device_runtime device_runtime/
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# Answers, renames and rolls back; without PyTorch it cannot learn.
FROM python:3.12-slim-bookworm AS predict
COPY constraints.txt /opt/ssd-edge/
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-compile -c /opt/ssd-edge/constraints.txt "$(ls /wheels/*.whl)[predict]" \
    && useradd --system --uid 10001 --home-dir /var/lib/ssd-edge ssd-edge \
    && install -d -o ssd-edge -g ssd-edge -m 750 /var/lib/ssd-edge
ENV SSD_EDGE_ROOT=/var/lib/ssd-edge
VOLUME /var/lib/ssd-edge
USER 10001
WORKDIR /var/lib/ssd-edge
# Unhealthy until a bundle is installed.
HEALTHCHECK --interval=60s --timeout=20s --start-period=30s CMD ["ssd-edge", "device", "status"]
ENTRYPOINT ["ssd-edge"]
CMD ["device", "status"]

FROM predict AS learn
USER 0
# From PyTorch, because that of PyPI comes with CUDA.
RUN pip install --no-cache-dir --no-compile -c /opt/ssd-edge/constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
ENV OMP_WAIT_POLICY=PASSIVE
USER 10001
