# loco-det from its wheel. Build the wheel first: python -m build --wheel
#
#   docker build -t loco_det .                                                                  # CPU
#   docker build -t loco_det --build-arg BASE=pytorch/pytorch:2.8.0-cuda12.6-cudnn9-runtime .   # CUDA
#   docker run --rm --shm-size=8g -v "$PWD:/data" -w /data loco_det doctor                      # CUDA: and --gpus all
#
# Docker gives a container 64 MiB of shared memory, too little for loader processes: hence --shm-size.
ARG BASE=python:3.12-slim
FROM ${BASE}
COPY dist/*.whl /tmp/
RUN python -m pip install --no-cache-dir /tmp/*.whl
RUN python -m loco_det --version
RUN loco-det configs laptop
ENTRYPOINT ["loco-det"]
CMD ["--help"]
