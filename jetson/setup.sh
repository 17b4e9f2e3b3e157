#!/usr/bin/env bash
# Makes a Jetson ready to build and run the engine of the bundle that this file lies in:
#
#     bash setup.sh            checks JetPack, makes .venv, builds the plugins or the kernels
#     bash setup.sh --check    only says what is there and what is missing
#     bash setup.sh --serve    also installs what run_engine.py --serve needs; for a bundle of
#                              target host-cpu that is all it does, besides what running it needs
#
# It may be run again at any time and does only what is still to be done. It makes .venv, build and
# setup.log inside the bundle and changes nothing else; what has to come from apt is named, not
# installed. Exit codes: 0 ready, 1 something failed, 2 something is missing, or the bundle runs
# without plugins, 130 stopped by Ctrl-C: run it again.
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # sh setup.sh: what follows is bash
set +o posix                                      # bash called sh
set -euo pipefail

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")" && pwd)
venv=$here/.venv
build=$here/build
tensorrt=required # or: optional, yes, no
kib_per_job=1500000 # memory that one nvcc may take
modules=(numpy tokenizers)
server=(starlette uvicorn prometheus_client llguidance)
missing=()

ok() { printf 'ok       %s\n' "$1"; }
lacks() { # what, remedy
    printf 'missing  %s: %s\n' "$1" "$2"
    missing+=("$1")
}
fail() {
    printf 'setup: %s\n' "$1" >&2
    exit 1
}

check_bundle() {
    local manifest=''
    [[ ! -r $here/manifest.json ]] || manifest=$(<"$here/manifest.json")
    if [[ $manifest =~ \"engines\"[[:space:]]*:[[:space:]]*\[[[:space:]]*\"onnxruntime\" ]]; then
        if [[ $serve == yes ]]; then
            for_cpu=yes
            modules=(numpy onnxruntime tokenizers)
            return 0
        fi
        printf 'setup: this bundle is for a CPU (target host-cpu) and needs no TensorRT plugins; %s\n' \
            'install numpy, onnxruntime and tokenizers (python3 -m pip install), then run_engine.py runs it.' >&2
        exit 2
    fi
    [[ -n $manifest ]] || return 0
    # Our kernels run the bundle as well, and need no TensorRT.
    [[ ! $manifest =~ \"kernels\" ]] || tensorrt=optional
    [[ -d $here/plugins ]] || {
        echo "setup: there is no plugins/ beside setup.sh; copy the whole bundle." >&2
        exit 2
    }
}

# at_least 10.3 10.16.2: whether the second version is not before the first
at_least() { [[ $(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1) == "$1" ]]; }

# Who brings what: a package of JetPack, and elsewhere the words behind it.
from_nvidia() { if [[ $jetson == yes ]]; then echo "$1"; else echo "$2"; fi; }

check_jetpack() {
    local release
    jetson=yes
    release=$(dpkg-query --show --showformat '${Version}' nvidia-l4t-core 2>/dev/null) || release=
    if [[ -z $release ]]; then
        ok "no Jetson Linux here, so this is no Jetson; what is installed is used"
        architecture=native
        jetson=no
    elif at_least 36.4 "$release"; then
        ok "Jetson Linux ${release%%-*}"
        architecture=87-real
        jetson=yes
    else
        lacks "JetPack 6.1 or newer (Jetson Linux ${release%%-*} is older than 36.4)" \
            "install JetPack 6.2 or 7.2; TensorRT 8 has no plugins of this kind"
    fi
}

check_tools() {
    local version
    nvcc=$(command -v nvcc || true)
    [[ -n $nvcc || ! -x /usr/local/cuda/bin/nvcc ]] || nvcc=/usr/local/cuda/bin/nvcc
    if [[ -n $nvcc ]]; then ok "CUDA compiler $nvcc"; else
        lacks "CUDA compiler" "$(from_nvidia "sudo apt install nvidia-jetpack" \
            "install NVIDIA's CUDA toolkit and put nvcc on PATH")"
    fi
    if command -v c++ >/dev/null; then ok "C++ compiler"; else
        lacks "C++ compiler" "sudo apt install g++"
    fi
    version=$(cmake --version 2>/dev/null | sed -n 's/^cmake version //p') || version=
    if [[ -n $version ]] && at_least 3.22 "$version"; then ok "CMake $version"; else
        lacks "CMake 3.22 or newer" "sudo apt install cmake"
    fi
}

check_python() {
    local version
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        lacks "Python 3.10 or newer" "$(from_nvidia "install JetPack 6.2 or 7.2" \
            "install it as python3")"
        return
    fi
    if python3 -c 'import ensurepip, venv' 2>/dev/null; then ok "Python with venv"; else
        lacks "Python's venv" "sudo apt install python3-venv"
    fi
    [[ $for_cpu == no ]] || return 0
    version=$(python3 -c 'import tensorrt; print(tensorrt.__version__)' 2>/dev/null) || version=
    if [[ -n $version ]] && at_least 10.3 "$version"; then
        ok "TensorRT $version"
        tensorrt=yes
    elif [[ $tensorrt == optional ]]; then
        ok "no TensorRT 10.3 or newer for python3: our kernels run the bundle without it"
        tensorrt=no
    else
        lacks "TensorRT 10.3 or newer for python3${version:+ (this is $version)}" \
            "$(from_nvidia "sudo apt install nvidia-jetpack" \
                "install NVIDIA's TensorRT with its headers and Python module")"
    fi
}

# Those of the virtual environment that still have to be installed.
packages_to_install() {
    local module version
    for module in "${modules[@]}"; do
        "$venv/bin/python" -c "import $module" 2>/dev/null || printf '%s\n' "${module%%.*}"
    done
    [[ -f $here/chat.json ]] || return 0 # else chat templates want a newer one than Ubuntu's own
    version=$("$venv/bin/python" -c 'import jinja2; print(jinja2.__version__)' 2>/dev/null) || version=
    if [[ -z $version ]] || ! at_least 3.1.6 "$version"; then echo 'jinja2>=3.1.6'; fi
}

check_own() {
    local packages
    mapfile -t packages < <(packages_to_install)
    if ((${#packages[@]} == 0)); then ok "$venv"; else
        lacks "${packages[*]} in $venv" "run setup.sh"
    fi
    [[ $for_cpu == no ]] || return 0
    if [[ -f $library ]]; then ok "$library"; else lacks "$library" "run setup.sh"; fi
}

make_venv() {
    local packages
    # One that was left half made has no pip.
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
        python3 -m venv --clear --system-site-packages "$venv"
    mapfile -t packages < <(packages_to_install)
    if ((${#packages[@]})); then
        # pycuda is compiled here, for this CUDA.
        PATH=${nvcc:+$(dirname -- "$nvcc"):}$PATH "$venv/bin/python" -m pip install --no-cache-dir \
            --disable-pip-version-check --quiet "${packages[@]}" ||
            fail "pip could not install ${packages[*]}; its messages are above (pycuda takes the\
 whole CUDA toolkit, curand.h too: sudo apt install nvidia-jetpack)."
    fi
    mapfile -t packages < <(packages_to_install)
    ((${#packages[@]} == 0)) || fail "${packages[*]} was installed and cannot be imported."
    ok "$venv"
}

# The plugins hold the kernels, too.
choose_library() {
    target=ssdi8_plugins
    hint=' (NvInfer.h comes with libnvinfer-dev)'
    [[ $tensorrt != no ]] || target=ssdi8_kernels hint=''
    library=$build/lib$target.so
}

build_library() {
    local cores memory jobs
    cores=$(nproc)
    memory=$(awk '/^MemAvailable:/ { print $2 }' /proc/meminfo)
    jobs=$((memory / kib_per_job))
    jobs=$((jobs < 1 ? 1 : jobs > cores ? cores : jobs))
    # CMake refuses a build of another folder: this bundle was moved or copied.
    if [[ -f $build/CMakeCache.txt &&
        $(<"$build/CMakeCache.txt") != *"CMAKE_HOME_DIRECTORY:INTERNAL=$here/plugins"* ]]; then
        rm -rf -- "$build"
    fi
    cmake -S "$here/plugins" -B "$build" -DCMAKE_CUDA_COMPILER="$nvcc" \
        -DCMAKE_CUDA_ARCHITECTURES="$architecture" >"$here/setup.log" 2>&1 ||
        fail "CMake failed; see $here/setup.log."
    cmake --build "$build" --target "$target" --parallel "$jobs" >>"$here/setup.log" 2>&1 ||
        fail "the ${target#ssdi8_} do not build; see $here/setup.log$hint."
    [[ -f $library ]] || fail "the build left no $library; see $here/setup.log."
    ok "$library"
}

check=no serve=no for_cpu=no nvcc='' jetson=no
for option in "$@"; do
    case $option in
        --check) check=yes ;;
        --serve) serve=yes ;;
        --help | -h)
            sed -n '2,/^set -e/ { /^#/ s/^# \{0,1\}//p }' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *)
            echo "setup: unknown option $option; see setup.sh --help." >&2
            exit 2
            ;;
    esac
done

trap 'echo "setup: stopped; run it again to go on." >&2; exit 130' INT
check_bundle
if [[ $for_cpu == no ]]; then
    check_jetpack
    check_tools
fi
check_python
[[ $for_cpu == yes || $tensorrt == no ]] || modules=(numpy pycuda.driver tokenizers)
[[ $serve == no ]] || modules+=("${server[@]}")
[[ $for_cpu == yes ]] || choose_library
[[ $check == no ]] || check_own
if ((${#missing[@]})); then
    printf 'setup: %d thing(s) missing, named above.\n' "${#missing[@]}" >&2
    exit 2
fi
[[ $check == no ]] || exit 0
[[ -w $here ]] || fail "$here cannot be written; copy the bundle to a folder of yours."
make_venv
if [[ $for_cpu == yes ]]; then
    echo "ready: $venv/bin/python $here/run_engine.py --serve"
    exit 0
fi
build_library
next=build_engine.py
[[ $tensorrt != no ]] || next='run_engine.py --verify'
echo "ready: $venv/bin/python $here/$next"
