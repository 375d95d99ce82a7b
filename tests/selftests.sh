#!/bin/bash
# The kernel's own mm and x86 self tests, from the same source package, in a microVM, with the levers of software KVM on
# and off: both columns must be equal.
#
#   selftests.sh --tree DIR --out DIR [--seconds N] PEREGRINE [ARGUMENT...]
#
# DIR of --tree is what `build.sh --keep-tree` keeps; PEREGRINE is the built command, the arguments go to its `run`
# (such as --kernel or --mem). Builds into --out, static, with gcc and the packages libcap-dev and
# libnuma-dev; leaves OUT/on.txt, OUT/off.txt (all the tests said) and prints a table. Exit code 1: columns differ.
set -euo pipefail

# What the kernel or the CPU leaves out has no tests here: hugetlbfs, userfaultfd, KSM, memfd_secret, LAM, AMX, 32-bit
# programs.
mm='compaction_test cow droppable gup_longterm khugepaged madv_populate map_fixed_noreplace map_populate mdwe_test
migration mkdirty mlock-random-test mlock2-tests mrelease_test mremap_dontunmap mremap_test mseal_test on-fault-limit
pagemap_ioctl protection_keys seal_elf soft-dirty split_huge_page_test thuge-gen transhuge-stress va_high_addr_switch
virtual_address_range'
x86='check_initial_reg_state corrupt_xstate_header fsgsbase fsgsbase_restore ioperm iopl mov_ss_trap nx_stack
ptrace_syscall sigaltstack sigreturn sigtrap_loop single_step_syscall syscall_arg_fault syscall_nt syscall_numbering
sysret_rip sysret_ss_attrs test_mremap_vdso test_shadow_stack test_vsyscall'
levers_off='ring0_doorbell=off syscall_by_fault bulk_memory=0 file_around=0,0 cow_around=0 pipe_runs=0 vsock_rx=4 pelt_step=1 tick_stretch=1 peregrine.thp=0 peregrine.batch=0'

die() {
	printf 'selftests: error: %s\n' "$*" >&2
	exit 1
}

tree='' out='' seconds=30
while [ $# -gt 0 ]; do
	case $1 in
	--tree) tree=$(realpath "${2:?--tree needs a directory}"); shift 2 ;;
	--out) out=${2:?--out needs a directory}; shift 2 ;;
	--seconds) seconds=${2:?--seconds needs a number}; shift 2 ;;
	-h | --help) sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
	*) break ;;
	esac
done
if [ -z "$tree" ] || [ -z "$out" ] || [ $# -eq 0 ]; then
	die "--tree, --out and the peregrine command are needed (try --help)"
fi
peregrine=$1
shift
sources=$tree/tools/testing/selftests
[ -d "$sources/mm" ] || die "$tree is not a kernel source tree: keep one with build.sh --keep-tree"
mkdir -p "$out/bin"

# The headers of this kernel, not of the host's; make leaves them in the tree.
headers() {
	make -s -C "$tree" headers >"$out/headers.log" 2>&1 || die "make headers failed: see $out/headers.log"
}

# build GROUP NAME SOURCE...: a test that does not build is named, and is missing from both columns.
build() {
	local group=$1 name=$2
	shift 2
	[ -x "$out/bin/$group.$name" ] && return
	gcc -std=gnu11 -O2 -s -static -pthread -no-pie -w -U_FORTIFY_SOURCE -D_GNU_SOURCE= -isystem "$tree/usr/include" -I"$sources" \
		-I"$sources/$group" -I"$out" -I"$tree/tools/include" -o "$out/bin/$group.$name" "$@" -lrt -lm -lcap \
		>"$out/$group.$name.log" 2>&1 || printf 'not built: %s %s (see %s)\n' "$group" "$name" "$out/$group.$name.log"
}

build_all() {
	local name extra
	: >"$out/local_config.h"
	for name in $mm; do
		extra=("$sources/mm/vm_util.c" "$sources/mm/thp_settings.c")
		case $name in
		khugepaged) extra+=(-include "$sources/kselftest.h") ;;
		migration) extra+=(-lnuma) ;;
		protection_keys) extra+=(-mxsave) ;;
		esac
		build mm "$name" "$sources/mm/$name.c" "${extra[@]}"
	done
	for name in $x86; do
		extra=()
		case $name in
		fsgsbase_restore | sysret_rip) extra=("$sources/x86/clang_helpers_64.S") ;;
		sysret_ss_attrs) extra=("$sources/x86/thunks.S") ;;
		check_initial_reg_state) extra=(-Wl,-ereal_start) ;;
		nx_stack) extra=(-Wl,-z,noexecstack) ;;
		esac
		build x86 "$name" "$sources/x86/$name.c" "${extra[@]}"
	done
}

# In the guest: unpacks the tests from standard input and says of each its exit code and how many seconds it took. The
# programs are static and alike, so they travel compressed.
# shellcheck disable=SC2016
in_the_guest='cd /tmp && python3 -c "import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode=\"r|xz\").extractall()" && for t in bin/*; do
	s=$(date +%s)
	timeout -s KILL '$seconds' "./$t" >log 2>&1 </dev/null; c=$?
	echo "== $t $c $(($(date +%s) - s))"; tail -n 40 log
done'

# run FILE ARGUMENT...: all tests in one microVM.
run() {
	local file=$1
	shift
	"$peregrine" run --mem 512 "$@" -- /bin/sh -c "$in_the_guest" <"$out/tests.tar.xz" >"$file"
}

# outcomes FILE: `TEST OUTCOME` by kselftest's exit codes, with the counts of its own summary where it has one.
outcomes() {
	awk '
	function flush() { if (name != "") print name, outcome (counts == "" ? "" : " (" counts ")") }
	/^== bin\// {
		flush(); name = $2; sub("bin/", "", name); code = $3; counts = ""
		outcome = code == 0 ? "pass" : code == 4 ? "skip" : code == 137 ? "time" : "fail " code
	}
	/^# Totals:/ { counts = $3 " " $4 " " $7 }
	END { flush() }' "$1"
}

headers
build_all
tar -C "$out" -cJf "$out/tests.tar.xz" bin
run "$out/on.txt" "$@"
run "$out/off.txt" "$@" --kernel-parameters "$levers_off"
join -t'|' <(outcomes "$out/on.txt" | sed 's/ /|/' | sort) <(outcomes "$out/off.txt" | sed 's/ /|/' | sort) |
	awk -F'|' 'BEGIN { print "| test | levers on | levers off |\n|---|---|---|" }
	{ printf "| %s | %s | %s |%s\n", $1, $2, $3, $2 == $3 ? "" : " differs"; bad += $2 != $3 }
	END { exit bad > 0 }'
