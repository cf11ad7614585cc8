# shellcheck shell=sh
# The service that starts `node serve`, under launchd or systemd: install.sh reads this.
# shellcheck disable=SC2154  # its variables

LABEL=local.mlx-tandem.node
UNIT=mlx-tandem-node.service

# The file of the service of one kind: login or boot.
service_of() {
    case $system-$1 in
        Darwin-login) printf '%s\n' "$HOME/Library/LaunchAgents/$LABEL.plist" ;;
        Darwin-boot) printf '%s\n' "$DESTDIR/Library/LaunchDaemons/$LABEL.plist" ;;
        Linux-login) printf '%s\n' "${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user/$UNIT" ;;
        Linux-boot) printf '%s\n' "$DESTDIR/etc/systemd/system/$UNIT" ;;
    esac
}

# Run a command as who the service of one kind belongs to.
as_owner_of() {
    kind=$1
    shift
    if [ "$kind" = boot ]; then as_root "$@"; else run "$@"; fi
}

# Whether there can be a service of the kind that was chosen.
check_service() {
    for kind in login boot; do
        file=$(service_of "$kind")
        if [ -e "$file" ] && ! service_is_ours "$file" && [ "$start" = "$kind" ]; then
            fail "$file is of another installation: remove that one first"
        fi
    done
    [ "$start" != none ] || return 0
    if [ "$system" = Darwin ]; then
        command -v launchctl >/dev/null || fail 'launchctl is missing: --no-service installs without'
        if [ "$start" = login ] && ! command -v cc >/dev/null; then
            fail 'a C compiler is needed for --at-login: xcode-select --install (--at-boot does without)'
        fi
    else
        command -v systemctl >/dev/null || fail 'systemd is missing: --no-service installs without'
        if [ "$start" = login ] && ! systemctl --user show-environment >/dev/null 2>&1; then
            # What /run/systemd/system says: systemd is installed, and started this machine, or not (a container).
            [ -d "$DESTDIR/run/systemd/system" ] || fail 'systemd does not run here: --no-service installs without'
            fail "$user has no session of systemd here, as after su or sudo: log in as $user directly, or take \
--at-boot or --no-service"
        fi
    fi
}

service_is_ours() { grep -qF "$lib/current/" "$1"; }

# The app that macOS asks about the local network: deploy/README.md says why there is one.
build_app() {
    app_built=no
    app_stamp=$(cat "$root/deploy/launchd/launcher.c" "$root/deploy/launchd/Info.plist" | cksum)
    # An unchanged app stays: macOS remembers by its program whether it may use the local network.
    if [ -d "$app" ] && [ "$(first_line "$lib/app-stamp")" = "$app_stamp" ]; then
        return 0
    fi
    app_built=yes
    run mkdir -p "$aside/mlx-tandem.app/Contents/MacOS"
    run cp "$root/deploy/launchd/Info.plist" "$aside/mlx-tandem.app/Contents/Info.plist"
    run cc -O2 -o "$aside/mlx-tandem.app/Contents/MacOS/mlx-tandem" "$root/deploy/launchd/launcher.c"
    run codesign --force --sign - --identifier "$LABEL" "$aside/mlx-tandem.app"
}

build_service() {
    # A unit may write to folders only that are there when it starts; and what cannot be made is said before anything
    # is replaced.
    run mkdir -p "$tandem_home"
    case $system-$start in
        Darwin-login) set -- agent --log "$log" --launcher "$app/Contents/MacOS/mlx-tandem" ;;
        Darwin-boot) set -- daemon --log "$log" --user "$user" ;;
        Linux-login) set -- user ;;
        Linux-boot)
            set -- system --user "$user" --writable "$tandem_home"
            models=$(setting HF_HOME)
            caches=$(setting XDG_CACHE_HOME)
            : "${models:=${caches:-$HOME/.cache}/huggingface}"
            run mkdir -p "$models"
            set -- "$@" --writable "$models"
            log_file=$(each_option log_option)
            if [ -n "$log_file" ]; then
                run mkdir -p "$(dirname "$log_file")"
                set -- "$@" --writable "$(dirname "$log_file")"
            fi
            ;;
    esac
    while IFS= read -r pair; do
        [ -z "$pair" ] || set -- "$@" --environment "$pair"
    done <<END
$(environment)
END
    each_option service_file "$@" --home "$HOME" -- "$lib/current/bin/node" serve
}

# The file that node serve is to write to, of these options of it.
log_option() {
    before='' found=''
    for word in "$@"; do
        case $word in
            --log=*) found=${word#--log=} ;;
            *) [ "$before" != --log ] || found=$word ;;
        esac
        before=$word
    done
    printf '%s\n' "$found"
}

service_file() {
    if [ "$dry" = yes ]; then
        say "would write: $(service_of "$start"), which starts: $lib/current/bin/node serve"
    else
        "$new/bin/python" "$root/deploy/services.py" "$@" >"$aside/service"
    fi
}

place_app() {
    if [ "$system-$start" != Darwin-login ]; then
        [ ! -f "$lib/app-stamp" ] || run rm -rf "$app" "$lib/app-stamp"
        return 0
    fi
    [ "$app_built" = yes ] || return 0
    run mkdir -p "$(dirname "$app")"
    run rm -rf "$app"
    run mv "$aside/mlx-tandem.app" "$app"
    printf '%s\n' "$app_stamp" | write "$lib/app-stamp"
    # Local Network privacy looks apps up where macOS registers them.
    register=/System/Library/Frameworks/CoreServices.framework/Frameworks/LaunchServices.framework/Support/lsregister
    [ ! -x "$register" ] || run "$register" -f "$app"
}

start_service() {
    service=$(service_of "$start")
    say "starting node serve ($service)"
    as_owner_of "$start" mkdir -p "$(dirname "$service")"
    as_owner_of "$start" install -m 644 "$aside/service" "$service"
    if [ "$system" = Darwin ]; then
        run mkdir -p "$(dirname "$log")"
        run touch "$log" # as the user, before launchd makes it as somebody else
        start_launchd
    elif [ "$start" = boot ]; then
        start_systemd --system
    else
        start_systemd --user
    fi
}

start_launchd() {
    domain=$(domain_of "$start")
    if [ "$start" = login ] && [ "$dry" = no ] && ! launchctl print "$domain" >/dev/null 2>&1; then
        say 'nobody is logged in at the screen: node serve starts with the next login (--at-boot would not wait)'
        return 0
    fi
    as_owner_of "$start" launchctl enable "$domain/$LABEL"
    as_owner_of "$start" launchctl bootstrap "$domain" "$service" || not_started "launchctl print $domain/$LABEL"
}

start_systemd() {
    as_owner_of "$start" systemctl "$1" daemon-reload
    as_owner_of "$start" systemctl "$1" enable "$UNIT"
    as_owner_of "$start" systemctl "$1" restart "$UNIT" || not_started "systemctl $1 status $UNIT"
}

not_started() {
    fail "the program is installed, but its service did not start; see: $1"
}

# Stop the service of one kind and remove its file.
stop_service() {
    file=$(service_of "$1")
    if [ ! -e "$file" ] || ! service_is_ours "$file"; then
        return 0
    fi
    if [ "$system" = Darwin ]; then
        stop_launchd "$1"
        as_owner_of "$1" rm -f "$file"
        return 0
    fi
    if [ "$1" = boot ]; then manager=--system; else manager=--user; fi
    as_owner_of "$1" systemctl "$manager" disable --now "$UNIT" || warn "systemd could not stop $UNIT"
    as_owner_of "$1" rm -f "$file"
    as_owner_of "$1" systemctl "$manager" daemon-reload || warn 'systemd still knows what was removed'
}

stop_launchd() {
    target=$(domain_of "$1")/$LABEL
    launchctl print "$target" >/dev/null 2>&1 || return 0
    as_owner_of "$1" launchctl bootout "$target" || true # it says so when the service is still on its way out
    [ "$dry" = no ] || return 0
    # A new one of that name is refused until the old one is gone, and nothing tells when that is.
    left=100
    while launchctl print "$target" >/dev/null 2>&1; do
        left=$((left - 1))
        [ $left -gt 0 ] || fail "launchd does not let go of $LABEL: launchctl print $target"
        sleep 1
    done
}

domain_of() {
    if [ "$1" = boot ]; then printf 'system\n'; else printf 'gui/%s\n' "$(id -u)"; fi
}
