# An image with the command distill, from the root of the repository:
#     docker build -t distill .
#     docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" distill doctor
# torch brings its own CUDA libraries, so the default base serves GPUs as well; the host needs NVIDIA's driver and its
# container toolkit. Another base has Python 3.10 or later, or an apt-get that installs it:
#     docker build -t distill --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
ARG BASE=python:3.11-slim

FROM python:3.11-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY distill distill
COPY configs configs
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${BASE}
# hadolint ignore=DL3008
RUN python3 -c 'import venv, ensurepip' || { \
        apt-get update \
        && apt-get install -y --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    }
COPY constraints.txt /opt/constraints.txt
COPY --from=build /wheel /opt/wheel
RUN python3 -m venv /opt/distill \
    && /opt/distill/bin/pip install --no-cache-dir -c /opt/constraints.txt "$(echo /opt/wheel/*.whl)[all]"
ENV PATH=/opt/distill/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /data
ENTRYPOINT ["distill"]
CMD ["--help"]
