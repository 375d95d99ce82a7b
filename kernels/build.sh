#!/bin/bash
# Builds the guest kernel from Debian's source package: fetch, check, patch, configure, compile.
#
#   build.sh --out DIR [--jobs N] [--source FILE.deb] [--keep-tree]
#   build.sh --print-deps
#
# Leaves vmlinux, System.map, config and source-version in DIR (vmlinux last, so that its presence means "complete") and
# make's output in DIR/build.log. It may write below DIR and nowhere else: the system's apt configuration, lists and caches
# are read, never changed. stdout carries only lines `progress STAGE DONE TOTAL UNIT`; words for people go to stderr.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LC_ALL=C TZ=UTC
unset MAKEFLAGS MFLAGS GNUMAKEFLAGS MAKELEVEL KBUILD_OUTPUT KCONFIG_CONFIG ARCH CROSS_COMPILE KCFLAGS

out='' jobs=$(nproc) source_deb='' keep_tree=no
work='' log='' group=''

say() { printf 'kernel: %s\n' "$*" >&2; }

die() {
	if [ -n "$log" ] && [ -s "$log" ]; then
		tail -n 30 "$log" >&2
	fi
	say "error: $*"
	exit 1
}

usage() {
	sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

progress() { printf 'progress %s %s %s %s\n' "$@"; }

lock_value() { sed -n "s/^$1=//p" "$here/kernels.lock"; }

parse_arguments() {
	while [ $# -gt 0 ]; do
		case $1 in
		--out) out=${2:?--out needs a directory}; shift ;;
		--jobs) jobs=${2:?--jobs needs a number}; shift ;;
		--source) source_deb=$(realpath "${2:?--source needs a file}"); shift ;;
		--keep-tree) keep_tree=yes ;;
		--print-deps) cat "$here/build-deps"; exit 0 ;;
		-h | --help) usage; exit 0 ;;
		*) die "unknown argument '$1' (try --help)" ;;
		esac
		shift
	done
	[ -n "$out" ] || die "--out DIR is missing (try --help)"
	[[ $jobs =~ ^[1-9][0-9]*$ ]] || die "--jobs wants a number from 1 on, not '$jobs'"
	[ "$(uname -m)" = x86_64 ] || die "only x86-64 kernels are built, on x86-64; this machine is $(uname -m)"
}

# Whatever way we leave, nothing keeps running and no half-built tree stays.
cleanup() {
	if [ -n "$group" ]; then
		kill -TERM -- "-$group" 2>/dev/null || true
		wait "$group" 2>/dev/null || true
	fi
	if [ -n "$work" ]; then
		rm -rf "$work"
	fi
}

# Runs a function in its own process group, so that one signal ends make and all that it started.
in_group() {
	set -m
	"$@" &
	group=$!
	set +m
	local status=0
	wait "$group" || status=$?
	group=''
	return "$status"
}

check_tools() {
	local tool package missing=''
	while read -r tool package; do
		command -v "$tool" >/dev/null || missing+=" $package"
	done <<-'TOOLS'
		gcc gcc
		make make
		flex flex
		bison bison
		bc bc
		xz xz-utils
		patch patch
		strip binutils
	TOOLS
	[ -f /usr/include/stdio.h ] || missing+=' libc6-dev'
	[ -z "$missing" ] || die "build tools are missing; install them with: apt-get install --no-install-recommends$missing"
}

# --- fetch ---

# Options that turn apt-get and apt-cache to a private root below $work; empty while the system's own lists serve.
apt_options=()

known_versions() {
	apt-cache "${apt_options[@]}" madison "$package" 2>>"$log" | awk -F'|' '{ gsub(/ /, "", $2); print $2 }' | uniq
}

# The machine's own entries for this release (one-line and deb822 form), said again for its backports: the same mirror, the
# same key, the same options.
backports_of() {
	local codename=$1 file=$2
	case $file in
	*.list)
		sed -nE "s/^(deb[[:space:]]+(\\[[^]]*\\][[:space:]]+)?[^[:space:]]+[[:space:]]+)$codename([[:space:]]+.*main.*)$/\\1$codename-backports\\3/p" "$file"
		;;
	*.sources)
		awk -v codename="$codename" '
			BEGIN { RS = ""; FS = "\n" }
			/(^|\n)Components:[^\n]*main/ && $0 ~ "(^|\n)Suites:([^\n]*[ \t])?" codename "([ \t]|\n|$)" {
				for (i = 1; i <= NF; i++) print ($i ~ /^Suites:/) ? "Suites: " codename "-backports" : $i
				print ""
			}' "$file"
		;;
	esac
}

# A private apt: the machine's sources and its backports, with lists and cache of its own.
make_private_apt() {
	local root=$work/apt codename
	codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release | tr -d '"')
	mkdir -p "$root/sources" "$root/state/lists/partial" "$root/cache/archives/partial"
	local file
	for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
		if [ -f "$file" ]; then
			cp "$file" "$root/sources/"
			if [ -n "$codename" ]; then
				backports_of "$codename" "$file" >"$root/sources/zz-backports-$(basename "$file")"
			fi
		fi
	done
	apt_options=(
		-o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$root/sources"
		-o "Dir::State=$root/state" -o "Dir::State::status=/var/lib/dpkg/status"
		-o "Dir::Cache=$root/cache" -o "APT::Sandbox::User=root" -o "Acquire::Languages=none"
	)
	say "asking the machine's Debian mirror for $package (a private package list, the system's stays as it is)"
	apt-get "${apt_options[@]}" update >>"$log" 2>&1 || say "apt-get update reported errors; going on with what it got"
}

# apt checks the archive's signature and the package's hash before it hands the file over.
download() {
	local version=$1
	cd "$work/deb"
	apt-get "${apt_options[@]}" -o "APT::Sandbox::User=root" -o "APT::Status-Fd=3" download "$package=$version" \
		3> >(show_download) >>"$log" 2>&1
}

show_download() {
	local kind percent
	while IFS=: read -r kind _ percent _; do
		if [ "$kind" = dlstatus ]; then
			progress fetch "${percent%.*}" 100 percent
		fi
	done
}

is_known() { known_versions | grep -qxF -- "$1"; }

fetch() {
	progress fetch 0 100 percent
	version=$(lock_value version)
	mkdir -p "$work/deb"
	if [ -n "$source_deb" ]; then
		ln -s "$source_deb" "$work/deb/source.deb"
		version=$(dpkg-deb --field "$source_deb" Version)
	elif is_known "$version" && in_group download "$version"; then
		:
	else
		make_private_apt
		if ! is_known "$version" || ! in_group download "$version"; then
			local newest
			newest=$(known_versions | head -n 1)
			[ -n "$newest" ] || die "no $package in this machine's apt sources or the backports of its release (wants Debian 12 or newer)"
			say "warning: the mirror no longer has $package $version (kernels.lock); using $newest of the same signed archive"
			version=$newest
			in_group download "$version" || die "the download of $package $version failed"
		fi
	fi
	progress fetch 100 100 percent
}

check_sha256() {
	local file=$1 wanted=$2 found
	found=$(sha256sum "$file" | cut -d' ' -f1)
	[ "$found" = "$wanted" ] ||
		die "$(basename "$file") is not the locked one: sha256 $found, kernels.lock says $wanted"
}

# --- unpack ---

# Other architectures, documentation, sound, graphics and the like are most of the tree's files; none of them is compiled.
# Kconfig files and Makefiles stay everywhere, since others include them.
unpack_tree() {
	# Who keeps the tree may want the kernel's self tests (tests/selftests.sh).
	local not_kept=(--exclude='*/tools/testing/*.[ch]')
	[ "$keep_tree" = no ] || not_kept=()
	# A checkpoint is a record of 10 KiB; tar's own shell expands the action.
	# shellcheck disable=SC2016
	tar -I 'xz -T0' -xf "$work/deb/source.tar.xz" -C "$work/tree" --strip-components=1 \
		--exclude='*/arch/[a-w]*/*.[chS]' --exclude='*/arch/xtensa/*.[chS]' --exclude='*.dts' --exclude='*.dtsi' \
		--exclude='*/Documentation/*.rst' --exclude='*/Documentation/*.yaml' --exclude='*/Documentation/*.txt' \
		"${not_kept[@]}" --exclude='*/tools/perf/*.[ch]' \
		--exclude='*/sound/*.[ch]' --exclude='*/drivers/gpu/*.[ch]' --exclude='*/drivers/media/*.[ch]' \
		--exclude='*/drivers/staging/*.[ch]' --exclude='*/drivers/net/ethernet/*.[ch]' \
		--exclude='*/drivers/net/wireless/*.[ch]' --checkpoint=5000 \
		--checkpoint-action='exec=echo progress unpack $((TAR_CHECKPOINT / 102)) "$UNPACK_MIB" MiB' 2>>"$log"
}

apply_patches() {
	local file
	for file in "$here"/patches/[0-9]*.patch; do
		printf '== %s\n' "$(basename "$file")" >>"$log"
		(cd "$work/tree" && patch -p1 --batch --forward --no-backup-if-mismatch <"$file" >>"$log" 2>&1) ||
			die "$(basename "$file") does not apply to $package $version; rebase it (see kernels/README.md)"
	done
}

unpack() {
	UNPACK_MIB=$(lock_value unpack_mib)
	export UNPACK_MIB
	progress unpack 0 "$UNPACK_MIB" MiB
	local deb=("$work"/deb/*.deb)
	if [ "$version" = "$(lock_value version)" ]; then
		check_sha256 "${deb[0]}" "$(lock_value deb_sha256)"
	fi
	dpkg-deb --fsys-tarfile "${deb[0]}" |
		tar -xO "./usr/src/$package.tar.xz" >"$work/deb/source.tar.xz" || die "no usr/src/$package.tar.xz in the package"
	if [ "$version" = "$(lock_value version)" ]; then
		check_sha256 "$work/deb/source.tar.xz" "$(lock_value tar_sha256)"
	fi
	# The package's own date goes into the kernel's version string: the same source gives the same bytes.
	source_date=$(date -u -d "@$(dpkg-deb --fsys-tarfile "${deb[0]}" | tar -tv --full-time "./usr/src/$package.tar.xz" |
		awk '{ print $4 "T" $5 "Z" }' | xargs date -u +%s -d)" '+%a %b %e %H:%M:%S UTC %Y')
	mkdir "$work/tree"
	in_group unpack_tree || die "the source archive did not unpack (is the disk full?)"
	rm -rf "$work/deb"
	apply_patches
	progress unpack "$UNPACK_MIB" "$UNPACK_MIB" MiB
}

# --- configure ---

make_kernel() { nice make -C "$work/tree" ARCH=x86_64 LOCALVERSION= "$@"; }

# tinyconfig and the fragments over it; what nobody asked for is "no" (allnoconfig), not the kernel's default.
merge_fragments() {
	cd "$work/tree"
	ARCH=x86_64 nice sh scripts/kconfig/merge_config.sh -n kernel/configs/tiny-base.config kernel/configs/tiny.config \
		arch/x86/configs/tiny.config "$here"/config/[0-9]*.config >>"$log" 2>&1
}

# Kconfig drops what its dependencies forbid without a word; a fragment's line that did not make it is an error here.
verify_config() {
	cat "$here"/config/[0-9]*.config | awk -v config="$work/tree/.config" '
		BEGIN {
			while ((getline line < config) > 0)
				if (line ~ /^CONFIG_/) { at = index(line, "="); have[substr(line, 1, at - 1)] = substr(line, at + 1) }
		}
		/^CONFIG_/ { at = index($0, "="); want[substr($0, 1, at - 1)] = substr($0, at + 1) }
		END {
			for (name in want) {
				is = (name in have) ? have[name] : "n"
				if (is != want[name]) print name "=" want[name] " (is " is ")"
			}
		}' | sort
}

configure() {
	progress configure 0 1 step
	in_group merge_fragments || die "the configuration could not be made"
	local lost
	lost=$(verify_config)
	[ -z "$lost" ] || die "options of kernels/config/ that this kernel did not take: ${lost//$'\n'/, }"
	progress configure 1 1 step
}

# --- compile ---

compile_vmlinux() {
	export KBUILD_BUILD_TIMESTAMP=$source_date KBUILD_BUILD_USER=peregrine KBUILD_BUILD_HOST=peregrine KBUILD_BUILD_VERSION=1
	make_kernel "-j$jobs" vmlinux 2>&1 | tee -a "$log" | show_compile
}

# Make's lines are `  CC      file`: each is one object, near enough.
show_compile() {
	local line done=0 total
	total=$(lock_value compile_steps)
	while IFS= read -r line; do
		case $line in
		'  LD      vmlinux'*) progress link 0 1 step; break ;;
		'  '[A-Z]*) done=$((done + 1)) ;;
		esac
		if [ $((done % 10)) = 0 ]; then
			progress compile "$done" "$((done > total ? done : total))" objects
		fi
	done
	cat >/dev/null
}

compile() {
	progress compile 0 "$(lock_value compile_steps)" objects
	in_group compile_vmlinux || die "the kernel did not compile; all of make's output is in $log"
}

# Everything is finished in $work first; renames put it in place.
install_results() {
	local result=$work/result file
	mkdir "$result"
	# The symbols are in System.map. Segments are 2 MiB aligned: sparse, the file takes what it holds.
	strip --strip-all -o "$work/stripped" "$work/tree/vmlinux"
	cp --sparse=always "$work/stripped" "$result/vmlinux"
	cp "$work/tree/System.map" "$result/System.map"
	cp "$work/tree/.config" "$result/config"
	printf '%s %s\n' "$package" "$version" >"$result/source-version"
	if [ "$keep_tree" = yes ]; then
		rm -rf "$out/tree"
		mv "$work/tree" "$out/tree"
	fi
	for file in source-version config System.map vmlinux; do
		mv -f "$result/$file" "$out/$file"
	done
	progress link 1 1 step
}

main() {
	parse_arguments "$@"
	check_tools
	mkdir -p "$out"
	out=$(cd "$out" && pwd)
	exec 9>"$out/.lock"
	flock -n 9 || die "another build is running in $out"
	trap cleanup EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	rm -rf "$out"/.build.*
	work=$(mktemp -d "$out/.build.XXXXXX")
	log=$out/build.log
	: >"$log"
	package=$(lock_value package)
	fetch
	unpack
	configure
	compile
	install_results
}

main "$@"
