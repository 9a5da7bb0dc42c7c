#!/usr/bin/env bash
# On the GPU machine, in the carried tree: bash bench/gpu/run.sh MINUTES SECTION ...   (options may follow)
#
# Needs a Python with torch, Triton and pytest, and no network: what else is wanted lies in .gpu/ (prepare.sh makes it;
# without it, what is installed is used). Results go to $OUT (runs/gpu), everything else to $WORK (/tmp/beitv2_gpu).
#
#   bash bench/gpu/run.sh keep FILE ...   keeps files on the machine for later calls: parts of DALI's wheels, photographs
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3} CARRIED=${CARRIED:-.gpu} WORK=${WORK:-/tmp/beitv2_gpu} OUT=${OUT:-runs/gpu}
mkdir -p "$WORK/kept" "$OUT"
say() { echo "=== $(date +%T) $*"; }

if [ "${1:-}" = keep ]; then
    cp -- "${@:2}" "$WORK/kept/" && ls -l "$WORK/kept"
    exit
fi
case ${1:-}${2:+ } in
    [0-9]*" ") minutes=$1 ;;
    *) sed -n '2,7s/^# \?//p' "$0"; exit 2 ;;
esac

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=$WORK/triton TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
site=$WORK/site
install() { "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$@"; }

say setup
exec 9>"$WORK/lock" && flock 9 # one of several at a time
if ls "$CARRIED"/wheels/*.whl >/dev/null 2>&1 && [ ! -e "$site/.wheels" ]; then
    install "$CARRIED"/wheels/*.whl && touch "$site/.wheels" || say "the wheels could not be installed"
fi
if ls "$WORK"/kept/part-* >/dev/null 2>&1 && [ ! -e "$site/.dali" ]; then
    mkdir -p "$WORK/dali" && cat "$WORK"/kept/part-* | tar xf - -C "$WORK/dali" && install "$WORK"/dali/*.whl &&
        touch "$site/.dali" || say "DALI could not be installed: are all its parts in $WORK/kept?"
fi
if [ -d "$site" ]; then
    export PATH=$site/bin:$PATH PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    runtime=$site/nvidia/cuda_runtime/lib # CUDA 12's, which xformers is built for
    [ -d "$runtime" ] && export LD_LIBRARY_PATH=$runtime${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
for folder in kernels train; do # links that were not carried
    [ -e "beitv2_fast/$folder" ] || ln -sfn "../$folder" "beitv2_fast/$folder"
done
for library in "$CARRIED"/_cpu*.*; do
    [ -e "$library" ] && [ ! -e "kernels/${library##*/}" ] && cp "$library" kernels/
done
if [ -e "$CARRIED/triton.tar.xz" ] && [ ! -d "$TRITON_CACHE_DIR" ]; then
    mkdir -p "$TRITON_CACHE_DIR" && tar xJf "$CARRIED/triton.tar.xz" -C "$TRITON_CACHE_DIR"
    # Triton 3.6 writes down where each file lay, and compiles again what is not there.
    sed -i -E "s|\"[^\"]*/([^\"/]+/[^\"/]+)\"|\"$TRITON_CACHE_DIR/\1\"|g" "$TRITON_CACHE_DIR"/*/__grp__*
fi
exec 9>&-
carried=$(ls "$TRITON_CACHE_DIR" 2>/dev/null | wc -l)
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.used,clocks.sm --format=csv,noheader

photographs=$(ls "$WORK"/kept/*.npz 2>/dev/null | head -1)
say "${*:2}"
# The program keeps to its minutes; should it not, it is ended half a minute later.
timeout -k 10 "$(awk "BEGIN {print 60 * $minutes + 30}")" "$PYTHON" -m bench.gpu "${@:2}" --minutes "$minutes" \
    --out "$OUT" ${photographs:+--data "$photographs"}
code=$?
say "ended with code $code; kernels in Triton's cache: $carried carried, $(ls "$TRITON_CACHE_DIR" 2>/dev/null | wc -l) now"
ls -l "$OUT"
exit $code
