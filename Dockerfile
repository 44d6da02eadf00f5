# segjax with JAX for NVIDIA GPUs. CUDA comes with JAX's wheels; the host needs a driver and the NVIDIA Container Toolkit.
#
#     docker build -t segjax .
#     docker run --rm --gpus all -v "$PWD:/workspace" segjax train --config segformer:b2,cityscapes
FROM python:3.13-slim

# Which parts of the driver the toolkit mounts into the container.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/segjax
COPY pyproject.toml README.md LICENSE ./
COPY segjax segjax
RUN pip install --no-cache-dir ".[cuda,hub,video,geo,import]"

# Data, runs and checkpoints are mounted here. Compiled programs stay with them, so that the next container starts soon.
WORKDIR /workspace
ENV XDG_CACHE_HOME=/workspace/.cache \
    TFDS_DATA_DIR=/workspace/tensorflow_datasets
ENTRYPOINT ["segjax"]
CMD ["--help"]
