# The image of one machine's runs (`docker run … --gateways 16`) and of every node of a Ray cluster.
#
#   docker build -t fedray:cuda .                                   torch with CUDA (12.1 or newer, inside torch's wheels)
#   docker build -t fedray:cpu --build-arg TORCH=cpu …              torch for CPUs, some 5 GB smaller
#
# pip takes its indexes from the build arguments PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS and PIP_CONSTRAINT,
# or from a pip.conf mounted at /etc/pip.conf; none of them is in the finished image.

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# cuda or cpu: what the finished torch must be; the build ends with a sentence when the indexes gave the other one.
ARG TORCH=cuda
# Of pyproject.toml: cluster (dashboard and jobs), data (digits), track (tensorboard), …
ARG EXTRAS=cluster,data
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CONSTRAINT
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/fedray
WORKDIR /src
# Dependencies first, for an empty package: a change of fedray's own code does not install torch and Ray again.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir fedray && touch fedray/__init__.py && /opt/fedray/bin/pip install ".[${EXTRAS}]" && rm -rf /src/*
RUN /opt/fedray/bin/python -c "import sys, torch; found = torch.version.cuda; \
    right = found is None if '${TORCH}' == 'cpu' else found is not None and float(found) >= 12.1; \
    sys.exit(None if right else f'TORCH=${TORCH} was asked for, but torch {torch.__version__} (CUDA: {found}) came: \
name the index of the other build in PIP_EXTRA_INDEX_URL')"
# What no run needs: test programs, headers, other libraries' tests, Ray's Java part.
RUN cd /opt/fedray/lib/python3*/site-packages \
    && find torch/bin -mindepth 1 ! -name torch_shm_manager -delete \
    && rm -rf torch/test torch/include torch/share ray/jars ray/cpp \
    && find numpy scipy sklearn sympy networkx -type d -name tests -prune -exec rm -rf {} +
COPY pyproject.toml README.md LICENSE ./
COPY fedray fedray
RUN /opt/fedray/bin/pip install --no-deps --force-reinstall . \
    && cd / && /opt/fedray/bin/python -c "import fedray; print(fedray.__version__, fedray.RunConfig())"

FROM ${BASE}
# For KubeRay's probes; add "openssh-client rsync" for a head node that `ray up` manages.
ARG PACKAGES=wget
# Login shells, which some KubeRay releases and `ray up` start, take PATH from /etc/profile.d instead of from ENV.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ${PACKAGES} \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    && groupadd --gid 1000 fedray \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash fedray \
    && mkdir /runs /workspace && chown fedray:fedray /runs /workspace && ln -s /runs /workspace/runs \
    && echo 'export PATH=/opt/fedray/bin:$PATH' > /etc/profile.d/fedray.sh
COPY --from=build /opt/fedray /opt/fedray
ENV PATH=/opt/fedray/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER fedray
# Runs go to /runs by default: /workspace/runs leads there. Your own modules are found in /workspace.
WORKDIR /workspace
VOLUME /runs
ENTRYPOINT ["python", "-m", "fedray"]
