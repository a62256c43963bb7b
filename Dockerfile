# mmfree in an image, from the wheel:  make image DEVICE=cuda12
# Packages are pinned in docker/constraints.txt, which says how it is made.
ARG PYTHON=3.12.12

FROM python:${PYTHON}-slim-bookworm AS build
# cpu, cuda12, cuda13 or tpu. CUDA comes as Python packages; the host has the driver.
ARG DEVICE=cpu
# Extras besides, behind commas: what docs/pods.md, docs/serving.md and docs/tracking.md use.
ARG EXTRAS=gcs,s3,wandb,serve
WORKDIR /build
COPY docker/constraints.txt dist/*.whl ./
RUN python -m venv /opt/mmfree
ENV PATH=/opt/mmfree/bin:$PATH
RUN case "$DEVICE" in \
      cpu) extras="$EXTRAS" ;; \
      cuda12 | cuda13 | tpu) extras="$DEVICE${EXTRAS:+,$EXTRAS}" ;; \
      *) echo "DEVICE is '$DEVICE': give cpu, cuda12, cuda13 or tpu" >&2; exit 1 ;; \
    esac; \
    set -- mmfree_jax-*.whl; \
    if [ "$#" -ne 1 ]; then echo "dist/ holds $# wheels: leave one there" >&2; exit 1; fi; \
    pip install --no-cache-dir --constraint constraints.txt "./$1${extras:+[$extras]}"
# pip only warns of an extra that there is none of.
RUN python -c "import sys; from importlib.metadata import metadata; \
known = metadata('mmfree-jax').get_all('Provides-Extra'); \
wrong = sorted(set(filter(None, sys.argv[1].split(','))) - set(known)); \
sys.exit('EXTRAS names ' + ', '.join(wrong) + ': give ' + ', '.join(known) if wrong else 0)" "$EXTRAS"

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/mmfree /opt/mmfree
RUN useradd --create-home --uid 1000 mmfree
ENV PATH=/opt/mmfree/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/mmfree
ENTRYPOINT ["mmfree"]
