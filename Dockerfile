# terrazzo in a container, for CPUs or for NVIDIA GPUs:
#
#   docker build -t terrazzo .
#   docker build -t terrazzo --build-arg TORCH=cu130 .
#   docker run --rm -it --shm-size 8g -v "$PWD:/work" terrazzo train CONFIG --work-dir /work/run
#   docker run --rm -it --gpus all ... for a GPU
#
# TORCH names the wheels of PyTorch: "cpu", or a CUDA version such as "cu130". These wheels bring CUDA's libraries along, so
# both kinds share one base image, and the host needs only NVIDIA's driver and its container toolkit.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

ARG TORCH=cpu
ARG EXTRAS=openmmlab,export,cpu

# Triton compiles a launcher for its kernels with gcc; OpenCV needs libgl1 and libglib2.0-0.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

# PyTorch first and alone: a change of terrazzo does not download it again.
RUN pip install --no-cache-dir "torch>=2.8" torchvision --index-url "https://download.pytorch.org/whl/${TORCH}"

COPY . /opt/terrazzo
RUN pip install --no-cache-dir "/opt/terrazzo[${EXTRAS}]"

RUN useradd --create-home terrazzo
USER terrazzo
WORKDIR /work
ENTRYPOINT ["terrazzo"]
CMD ["--help"]
