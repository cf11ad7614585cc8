#!/bin/sh
# Put mlx-tandem on this machine, or take it off again. The text below is what --help prints.
set -eu
# shellcheck source-path=SCRIPTDIR source=service.sh
. "$(dirname "$0")/service.sh"

usage() {
    cat <<'END'
Usage: deploy/install.sh [OPTION ...] [-- OPTION OF node serve ...]

Installs this checkout into a private environment, links its commands, and has `node serve` start by itself.
Run it again to upgrade: what is not said again stays as it was. Nothing is replaced before the new one is complete.

  --at-login      node serve runs while you are logged in (this is what happens unless told otherwise)
  --at-boot       node serve runs from the start of the machine on, as you; asks for your password (sudo)
  --no-service    nothing starts by itself
  --prefix DIR    into DIR/lib, DIR/bin and DIR/share (default: ~/.local)
  --uninstall     stop it and remove all that was installed; runs, models and pairings in TANDEM_HOME stay
  --purge         with --uninstall: remove TANDEM_HOME, too
  --dry-run       only say what would be done
  -h, --help      this

Examples:
  deploy/install.sh
  deploy/install.sh --at-boot -- --name Studio --max-memory 12GB
  deploy/install.sh --uninstall

TANDEM_HOME, TANDEM_FLEET, TANDEM_BONJOUR and HF_HOME are handed to the service where they are set.
END
}

HANDED_DOWN='TANDEM_HOME TANDEM_FLEET TANDEM_BONJOUR HF_HOME XDG_DATA_HOME XDG_CACHE_HOME'
DESTDIR=${DESTDIR:-} # of the system's own files: for packagers and tests

say() { printf '%s\n' "$*"; }
warn() { printf 'install.sh: %s\n' "$*" >&2; }
fail() {
    warn "$1"
    exit "${2:-1}"
}

# Run a command, or only print it.
run() {
    if [ "$dry" = yes ]; then
        printf 'would run:'
        printf ' %s' "$@"
        printf '\n'
    else
        "$@"
    fi
}

# Run a command that changes the system's own files or services.
as_root() {
    if [ -n "$DESTDIR" ] || [ "$(id -u)" = 0 ]; then run "$@"; else run sudo "$@"; fi
}

# Write stdin to a file, or only name it.
write() {
    if [ "$dry" = yes ]; then
        cat >/dev/null
        say "would write: $1"
    else
        cat >"$1"
    fi
}

# A path as a service finds it, which runs in another folder.
full_path() {
    case $1 in
        /*) printf '%s\n' "$1" ;;
        [~]/*) printf '%s\n' "$HOME/${1#??}" ;;
        *) printf '%s\n' "$PWD/$1" ;;
    esac
}

first_line() { [ -f "$1" ] && head -n 1 "$1" || true; }

# ---------------------------------------------------------------- what was asked for

parse() {
    dry=no start='' uninstall=no purge=no options_given=no
    prefix=${PREFIX:-$HOME/.local}
    while [ $# -gt 0 ]; do
        case $1 in
            --at-login) choose login ;;
            --at-boot) choose boot ;;
            --no-service) choose none ;;
            --prefix)
                [ $# -gt 1 ] || fail '--prefix needs a folder (deploy/install.sh --help)' 2
                prefix=$2
                shift
                ;;
            --prefix=*) prefix=${1#--prefix=} ;;
            --uninstall) uninstall=yes ;;
            --purge) purge=yes ;;
            --dry-run) dry=yes ;;
            -h | --help)
                usage
                exit 0
                ;;
            --)
                shift
                options_given=yes
                break
                ;;
            *) fail "no such option: $1 (deploy/install.sh --help; options of node serve stand behind --)" 2 ;;
        esac
        shift
    done
    serve_options=$(full_options "$@")
    for word in "$@"; do
        case $word in
            -h | --help | --check) fail "$word is for a terminal, no option of a service: node serve $word" 2 ;;
        esac
    done
    prefix=$(full_path "$prefix")
    [ "$purge" = no ] || [ "$uninstall" = yes ] || fail '--purge goes with --uninstall' 2
    if [ "$uninstall" = yes ] && [ -n "$start$serve_options" ]; then
        fail '--uninstall takes no option of an installation' 2
    fi
}

# Options of node serve, one on a line, with full paths in them.
full_options() {
    before=''
    for word in "$@"; do
        case $before in
            --join) [ "${word#@}" = "$word" ] || word=@$(full_path "${word#@}") ;;
            --log) word=$(full_path "$word") ;;
            *)
                case $word in
                    --join=@*) word=--join=@$(full_path "${word#--join=@}") ;;
                    --log=*) word=--log=$(full_path "${word#--log=}") ;;
                esac
                ;;
        esac
        printf '%s\n' "$word"
        before=$word
    done
}

choose() {
    [ -z "$start" ] || [ "$start" = "$1" ] || fail 'take one of --at-login, --at-boot and --no-service' 2
    start=$1
}

locate() {
    root=$(CDPATH='' cd "$(dirname "$0")/.." && pwd)
    lib=$prefix/lib/mlx-tandem
    bin=$prefix/bin
    share=$prefix/share
    user=$(id -un)
    system=$(uname -s)
    home_file=$lib/environment
    tandem_home=$(setting TANDEM_HOME)
    data_home=$(setting XDG_DATA_HOME)
    case $system in
        Darwin)
            app=$HOME/Applications/mlx-tandem.app
            log=$HOME/Library/Logs/mlx-tandem/node.log
            : "${tandem_home:=$HOME/Library/Application Support/mlx-tandem}"
            ;;
        Linux)
            app='' log=''
            : "${tandem_home:=${data_home:-$HOME/.local/share}/mlx-tandem}"
            ;;
        *) fail "$system: only macOS and Linux are supported" ;;
    esac
}

# ---------------------------------------------------------------- before anything is touched

check() {
    if [ -n "${SUDO_USER:-}" ] && [ "$(id -u)" = 0 ]; then
        fail 'run it without sudo, as the user that shall serve: it asks for your password where it must' 2
    fi
    if [ "$purge" = yes ]; then
        case ${tandem_home%/} in
            '' | "${HOME%/}") fail "TANDEM_HOME is $tandem_home: remove by hand what is yours to remove" 2 ;;
        esac
    fi
    case $prefix$HOME$tandem_home in
        *'
'*) fail 'a folder has a line break in its name' 2 ;;
    esac
}

check_install() {
    [ -f "$root/pyproject.toml" ] || fail "$root is no checkout: this copy can only --uninstall" 2
    [ -n "$start" ] || start=$(first_line "$lib/start")
    [ -n "$start" ] || start=login
    if [ "$options_given" = no ] && [ -f "$lib/serve-options" ]; then
        serve_options=$(cat "$lib/serve-options")
    fi
    for name in coordinator tandem; do
        if { [ -e "$bin/$name" ] || [ -L "$bin/$name" ]; } && ! ours "$bin/$name"; then
            fail "$bin/$name is of another installation: remove it, or choose another --prefix"
        fi
    done
    linked='coordinator tandem'
    other=$(command -v node || true)
    if [ -L "$bin/node" ] && ours "$bin/node"; then
        linked='coordinator node tandem'
    elif [ -z "$other" ] && [ ! -e "$bin/node" ]; then
        linked='coordinator node tandem'
    else
        say "there is another node here (${other:-$bin/node}): it stays, and tandem has all commands: tandem serve"
    fi
    check_service
}

# Whether a link is one that this script made.
ours() {
    case $(readlink "$1" || true) in
        "$lib"/*) return 0 ;;
        *) return 1 ;;
    esac
}

# ---------------------------------------------------------------- building aside

one_at_a_time() {
    run mkdir -p "$lib"
    [ "$dry" = no ] || return 0
    if ! mkdir "$lib/.lock" 2>/dev/null; then
        holder=$(first_line "$lib/.lock/pid")
        if [ -n "$holder" ] && kill -0 "$holder" 2>/dev/null; then
            fail "another install.sh (process $holder) is at work on $lib"
        fi
        rm -rf "$lib/.lock"
        mkdir "$lib/.lock" || fail "another install.sh is at work on $lib"
    fi
    echo $$ >"$lib/.lock/pid"
    made=''
    trap 'clean_up' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

clean_up() {
    [ -z "$made" ] || rm -rf "$made"
    rm -rf "$lib/.lock" "$lib/.aside"
    rmdir "$lib/versions" "$lib" 2>/dev/null || true
}

build() {
    version=$(date +%Y%m%d-%H%M%S)-$$
    new=$lib/versions/$version
    aside=$lib/.aside
    made=$new
    say "installing into $new (minutes, the first time) ..."
    run rm -rf "$aside"
    run mkdir -p "$lib/versions" "$aside"
    run env TANDEM_VENV="$new" "$root/deploy/run" --install
    run "$new/bin/tandem" --version
    if [ -n "$serve_options" ]; then
        say "node serve: $(printf '%s' "$serve_options" | tr '\n' ' ')"
        # Before anything is replaced: a service with a wrong option would never start.
        [ "$dry" = yes ] || check_options
    fi
}

# Call a function with one argument for each option of node serve, behind those given here.
each_option() {
    while IFS= read -r word; do
        [ -z "$word" ] || set -- "$@" "$word"
    done <<END
$serve_options
END
    "$@"
}

# Let the new version say whether it would serve with its options, in the folder and with the variables of the service.
check_options() {
    set --
    while IFS= read -r pair; do
        [ -z "$pair" ] || set -- "$@" "$pair"
    done <<END
$(environment)
END
    (cd "$HOME" && each_option env "$@" "$new/bin/node" serve --check </dev/null) ||
        fail 'node serve would not start with these options; nothing was changed' 2
}

# Click writes what completes its commands.
build_completions() {
    for name in $linked; do
        variable=_$(printf '%s' "$name" | tr '[:lower:]' '[:upper:]')_COMPLETE
        for shell in bash zsh fish; do
            [ "$dry" = no ] || continue
            # It warns of an old bash on this machine, which does not read the file anyway.
            env "$variable=${shell}_source" "$new/bin/$name" >"$aside/$name.$shell" 2>/dev/null || true
            grep -q "$variable" "$aside/$name.$shell" || fail "$name writes no completion for $shell"
        done
    done
}

build_settings() {
    environment | write "$aside/environment"
    printf '%s\n' "$serve_options" | write "$aside/serve-options"
    printf '%s\n' "$start" | write "$aside/start"
}

# NAME=VALUE of what the service is handed.
environment() {
    for name in $HANDED_DOWN; do
        value=$(setting "$name")
        [ -z "$value" ] || printf '%s=%s\n' "$name" "$value"
    done
}

# The value of a variable that the service is handed: what is set now, else what was at the last time.
setting() {
    eval "value=\${$1:-}"
    [ -n "$value" ] || value=$(sed -n "s/^$1=//p" "$home_file" 2>/dev/null || true)
    case $1 in
        TANDEM_HOME | HF_HOME | XDG_*) [ -z "$value" ] || value=$(full_path "$value") ;;
    esac
    printf '%s\n' "$value"
}

# ---------------------------------------------------------------- putting it into place

swap() {
    # mv would move a link into the folder that the old one leads to.
    run "$new/bin/python" -c 'import os, sys; os.symlink(sys.argv[1], sys.argv[2]); os.replace(*sys.argv[2:])' \
        "versions/$version" "$aside/current" "$lib/current"
    made='' # from here on it is in use
    run mv "$aside/environment" "$aside/serve-options" "$aside/start" "$lib"
    run rm -rf "$lib/deploy"
    run mkdir -p "$lib/deploy" "$bin"
    run cp "$root/deploy/install.sh" "$root/deploy/service.sh" "$lib/deploy"
    for name in $linked; do
        run ln -sfn "$lib/current/bin/$name" "$bin/$name"
        for shell in bash zsh fish; do
            run mkdir -p "$(dirname "$(completion $shell "$name")")"
            run mv "$aside/$name.$shell" "$(completion $shell "$name")"
        done
    done
}

# Where the completion of a command lies.
completion() {
    case $1 in
        bash) printf '%s\n' "$share/bash-completion/completions/$2" ;;
        zsh) printf '%s\n' "$share/zsh/site-functions/_$2" ;;
        fish) printf '%s\n' "$share/fish/vendor_completions.d/$2.fish" ;;
    esac
}

# Remove versions that nothing uses any more: a program that runs loads parts of its own as it needs them.
remove_old() {
    [ -d "$lib/versions" ] || return 0
    running=$(ps -A -ww -o command= 2>/dev/null || true)
    for folder in "$lib"/versions/*; do
        [ "$folder" != "$new" ] || continue
        if is_used "$folder"; then
            say "$folder is in use: it goes with the next upgrade"
        else
            run rm -rf "$folder"
        fi
    done
}

# Whether a program runs from a version, by the lock that ours hold (node/in_use.py), or by its name.
is_used() {
    case $running in *"$1"/*) return 0 ;; esac
    [ "$dry" = no ] || return 1 # there is no new version to ask
    [ "$("$new/bin/python" -P -m node.in_use "$1")" != "$1" ]
}

# ---------------------------------------------------------------- both ways

install_it() {
    check_install
    one_at_a_time
    build
    build_completions
    build_settings
    [ "$system-$start" != Darwin-login ] || build_app
    [ "$start" = none ] || build_service
    swap
    stop_service login
    stop_service boot
    place_app
    [ "$start" = none ] || start_service
    remove_old
    [ "$dry" = yes ] || say_done
}

# What puts the commands on the PATH of every terminal: each shell reads another file, and macOS's terminals are login
# shells, which read others.
path_hint() {
    profile=.profile
    case $(basename "${SHELL:-sh}")-$system in
        fish-*)
            printf "fish_add_path '%s'\n" "$bin"
            return 0
            ;;
        zsh-Darwin) profile=.zprofile ;;
        zsh-*) profile=.zshrc ;;
        bash-Darwin) profile=.bash_profile ;;
        bash-*) profile=.bashrc ;;
    esac
    printf "echo 'export PATH=\"%s:\$PATH\"' >> ~/%s\n" "$bin" "$profile"
}

say_done() {
    say "installed: $(for name in $linked; do printf '%s/%s ' "$bin" "$name"; done)"
    case :$PATH: in
        *":$bin:"*) ;;
        *) say "add $bin to your PATH, as in: $(path_hint)" ;;
    esac
    say "for completion in zsh, have this in ~/.zshrc before compinit: fpath=($share/zsh/site-functions \$fpath)"
    case $system-$start in
        Darwin-login)
            say 'at its first start macOS asks whether mlx-tandem may find devices on the local network: allow it'
            ;;
        Linux-login) say "what it says: journalctl --user -u $UNIT" ;;
        Linux-boot) say "what it says: journalctl -u $UNIT" ;;
    esac
    [ -z "$log" ] || [ "$start" = none ] || say "what it says: $log"
    [ "$start" = none ] || say 'the code for coordinator pair stands there, too; tandem node-pair shows a new one'
    elsewhere=''
    [ "$prefix" = "$HOME/.local" ] || elsewhere=" --prefix $prefix"
    say "to remove it: $lib/deploy/install.sh --uninstall$elsewhere"
}

uninstall_it() {
    stop_service login
    stop_service boot
    for name in coordinator node tandem; do
        if [ -L "$bin/$name" ] && ours "$bin/$name"; then
            run rm -f "$bin/$name"
            for shell in bash zsh fish; do run rm -f "$(completion "$shell" "$name")"; done
        fi
    done
    [ ! -f "$lib/app-stamp" ] || run rm -rf "$app"
    if [ -n "$log" ] && [ ! -e "$(service_of login)" ] && [ ! -e "$(service_of boot)" ]; then
        run rm -rf "$(dirname "$log")"
    fi
    run rm -rf "$lib"
    # What it made, it leaves as empty as it was.
    for folder in "$share/bash-completion/completions" "$share/bash-completion" "$share/zsh/site-functions" \
        "$share/zsh" "$share/fish/vendor_completions.d" "$share/fish" "$share" "$prefix/lib" "$bin"; do
        [ "$dry" = yes ] || rmdir "$folder" 2>/dev/null || true
    done
    if [ "$purge" = yes ]; then
        run rm -rf "$tandem_home"
    elif [ -d "$tandem_home" ]; then
        say "kept: $tandem_home (--uninstall --purge removes it)"
    fi
    say 'removed'
}

parse "$@"
locate
check
if [ "$uninstall" = yes ]; then uninstall_it; else install_it; fi
