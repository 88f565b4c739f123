# syntax=docker/dockerfile:1
# The program and nothing else, for amd64 and arm64: docker buildx build --platform linux/amd64,linux/arm64 .
# To pin the base, put the digest of your registry behind the tag; packages of the base's mirrors still move:
#   --build-arg PYTHON=python:3.11.14-slim-bookworm@sha256:...
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
# On amd64 the plain torch carries several GB of CUDA; an index with its CPU build spares them:
#   --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL=""
ARG EXTRAS=feed,kafka,parquet
WORKDIR /src
RUN python -m venv /opt/quartet
# What is slow and seldom changes first: a change of the program then costs seconds.
COPY constraints.txt ./
RUN /opt/quartet/bin/pip install --constraint constraints.txt torch numba
COPY pyproject.toml README.md LICENSE ./
COPY streams streams
COPY agents agents
COPY worker worker
RUN /opt/quartet/bin/pip install --constraint constraints.txt ".[${EXTRAS}]"

FROM ${PYTHON}
# libgomp is what XGBoost and LightGBM link to, and the only package beyond the base.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/quartet /opt/quartet
# Numbers, not names: `runAsNonRoot` can only judge those. Both directories may be volumes.
RUN install -d -o 10001 -g 10001 -m 0750 /state /models
ENV PATH=/opt/quartet/bin:$PATH \
    HOME=/state \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    QUARTET_STATE_DIR=/state \
    QUARTET_MODELS=/models \
    QUARTET_HTTP_HOST=0.0.0.0
USER 10001:10001
WORKDIR /state
# The root may be read-only: compiled kernels are cached under /state, and nothing else is written.
VOLUME ["/state"]
EXPOSE 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=120s --retries=3 CMD ["quartet", "check", "--live"]
ENTRYPOINT ["quartet"]
CMD ["run"]
