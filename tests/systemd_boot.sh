#!/bin/bash
# Boots a real systemd, PID 1 of its own namespaces, on an overlay of this machine's root: units can be tested from end to
# end, and nothing outside the overlay is written. Needs root, unshare and nsenter (util-linux), systemd and dbus.
#
#   systemd_boot.sh boot BASE [FROM:TO ...]   start, with the folder FROM seen as TO; BASE is an empty folder
#   systemd_boot.sh exec BASE COMMAND...      run something inside
#   systemd_boot.sh stop BASE                 power off, kill what is left, unmount
# The network is the machine's own, so that a server inside answers outside.
set -eu
verb=$1 base=$2
shift 2
cgroup=$base/cgroup

first_process() { # of the namespaces, seen from outside: the child of unshare
  local outer
  outer=$(cat "$base/unshare.pid" 2>/dev/null) && cut -d' ' -f1 "/proc/$outer/task/$outer/children" 2>/dev/null
}

inside() { # keeps stdin
  nsenter --target "$(cat "$base/init.pid")" --mount --pid --uts --ipc --cgroup --root --wd -- \
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb LANG=C.UTF-8 "$@"
}

boot() {
  mkdir -p "$base/overlay" "$base/root" "$cgroup"
  # An overlay cannot lie on an overlay, which is what the root of a container often is.
  [ "$(stat -f -c %T "$base")" != overlayfs ] || mount -t tmpfs tmpfs "$base/overlay"
  mkdir -p "$base/overlay/upper" "$base/overlay/work"
  mount -t cgroup2 cgroup2 "$cgroup"
  mkdir -p "$cgroup/$(basename "$base")-systemd"
  printf '%s\n' "$@" > "$base/binds"
  # Into the control group first, so that it is the root of the new cgroup namespace.
  setsid bash -c '
    echo $$ > "$0/unshare.pid"
    echo $$ > "$1/cgroup.procs"
    exec unshare --mount --pid --fork --kill-child=SIGKILL --uts --ipc --cgroup bash "$2" inner "$0"
  ' "$base" "$cgroup/$(basename "$base")-systemd" "$(realpath "$0")" < /dev/null > "$base/console.log" 2>&1 &
  for _ in $(seq 300); do
    if pid=$(first_process) && [ -n "$pid" ]; then
      echo "$pid" > "$base/init.pid"
      case $(inside systemctl is-system-running 2>/dev/null || true) in running | degraded) return 0 ;; esac
    fi
    sleep 0.2
  done
  echo "systemd did not come up:" >&2
  tail -20 "$base/console.log" >&2
  return 1
}

inner() { # PID 1 of the namespaces: mounts, then becomes systemd
  local root=$base/root
  mount --make-rprivate /
  mount -t overlay overlay -o "lowerdir=/,upperdir=$base/overlay/upper,workdir=$base/overlay/work" "$root"
  while IFS=: read -r from to; do
    [ -n "$from" ] || continue
    mkdir -p "$root$to"
    mount --bind "$from" "$root$to"
    mount -o remount,bind,ro "$root$to"
  done < "$base/binds"
  mount -t proc proc "$root/proc" -o nosuid,nodev,noexec
  mount --bind "$root/proc/sys" "$root/proc/sys"
  mount -o remount,bind,ro "$root/proc/sys" # no setting of the machine's kernel is changed
  mount -t sysfs sysfs "$root/sys" -o ro,nosuid,nodev,noexec
  mount -t tmpfs tmpfs "$root/sys/fs/cgroup" -o size=1m 2>/dev/null || true
  mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup" -o nosuid,nodev,noexec
  mount -t tmpfs tmpfs "$root/dev" -o mode=755,nosuid
  for name in null zero full random urandom tty; do
    : > "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
  done
  mkdir -p "$root/dev/pts" "$root/dev/shm" "$root/dev/mqueue"
  mount -t devpts devpts "$root/dev/pts" -o newinstance,ptmxmode=0666,mode=620
  ln -s pts/ptmx "$root/dev/ptmx"
  ln -s /proc/self/fd "$root/dev/fd"
  for number in 0:stdin 1:stdout 2:stderr; do ln -s "fd/${number%:*}" "$root/dev/${number#*:}"; done
  mount -t tmpfs tmpfs "$root/dev/shm" -o mode=1777,nosuid,nodev
  mount -t tmpfs tmpfs "$root/run" -o mode=755,nosuid,nodev
  mount -t tmpfs tmpfs "$root/tmp" -o mode=1777,nosuid,nodev
  # Nothing that reaches for the machine's hardware, kernel or network.
  local units=$root/etc/systemd/system
  for unit in systemd-sysctl.service systemd-modules-load.service systemd-udevd.service systemd-udev-trigger.service \
    systemd-udevd-kernel.socket systemd-udevd-control.socket systemd-remount-fs.service systemd-random-seed.service \
    systemd-timesyncd.service systemd-networkd.service systemd-resolved.service systemd-binfmt.service \
    proc-sys-fs-binfmt_misc.automount sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
    dev-hugepages.mount dev-mqueue.mount sys-fs-fuse-connections.mount systemd-pstore.service tmp.mount \
    systemd-tmpfiles-clean.timer systemd-journal-flush.service systemd-firstboot.service \
    systemd-machine-id-commit.service swap.target console-getty.service getty.target; do
    ln -sf /dev/null "$units/$unit"
  done
  : > "$root/etc/fstab"
  mkdir -p "$root/etc/tmpfiles.d" "$root/etc/systemd/journald.conf.d"
  ln -sf /dev/null "$root/etc/tmpfiles.d/tmp.conf"
  ln -sf /dev/null "$root/etc/tmpfiles.d/x11.conf"
  printf '[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\n' > "$root/etc/systemd/journald.conf.d/test.conf"
  printf '[Unit]\nRequires=sysinit.target dbus.socket\nAfter=sysinit.target dbus.socket\nAllowIsolate=yes\n' \
    > "$units/test.target"
  cd "$root"
  mkdir -p run/outside
  pivot_root . run/outside
  cd /
  umount -l /run/outside
  rmdir /run/outside
  hostname test
  exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin container=test TERM=dumb \
    /lib/systemd/systemd --system --unit=test.target --log-target=journal --show-status=no
}

stop() {
  local outer
  outer=$(cat "$base/unshare.pid" 2>/dev/null) || outer=
  if [ -n "$outer" ] && kill -0 "$outer" 2>/dev/null; then
    inside systemctl poweroff --no-block > /dev/null 2>&1 || true
    for _ in $(seq 50); do kill -0 "$outer" 2>/dev/null && sleep 0.2 || break; done
    kill -9 "$outer" 2>/dev/null || true # PID 1 goes with it, and everything inside with PID 1
  fi
  echo 1 > "$cgroup/$(basename "$base")-systemd/cgroup.kill" 2>/dev/null || true
  sleep 0.5
  find "$cgroup/$(basename "$base")-systemd" -depth -type d -exec rmdir {} + 2>/dev/null || true
  umount "$cgroup" 2>/dev/null || true
  umount "$base/overlay" 2>/dev/null || true
}

case $verb in
  boot) boot "$@" ;;
  exec) inside "$@" ;;
  inner) inner ;;
  stop) stop ;;
esac
