#!/bin/sh
# Enter a Debian root: enter.sh ROOT LAYER NETWORK [MODE FROM TO]... -- COMMAND...
#
# lab/hosts/root.py runs it in namespaces of its own (mount, pid, ipc, uts; net unless NETWORK is "network"), as their
# first process. ROOT, a folder or several with colons between, newest first, stays as it is: what the command changes
# lies in LAYER. MODE is ro or rw.
set -eu
root=$1 layer=$2 network=$3
shift 3
mkdir -p "$layer/upper" "$layer/work" "$layer/root"
mount -t overlay -o "lowerdir=$root,upperdir=$layer/upper,workdir=$layer/work" overlay "$layer/root"
cd "$layer/root"
mount -t proc proc proc
mount --rbind /sys sys
mount -t tmpfs -o mode=755 run run
mkdir -p run/lock
# Nodes, not mounts: libvirt moves each mount below /dev into QEMU's own /dev, and fails on a file. Without kvm: an
# accelerator that nobody chose would make the tests something else on another machine.
mount -t tmpfs -o mode=755 dev dev
mkdir dev/pts dev/shm dev/net
for node in null zero full random urandom tty fuse loop-control net/tun; do
    if [ -e "/dev/$node" ]; then cp -a "/dev/$node" "dev/$node"; fi
done
for node in /dev/loop[0-9]*; do
    if [ -b "$node" ]; then cp -a "$node" dev/; fi
done
mount -t devpts -o newinstance,mode=620,ptmxmode=666,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
if [ "$network" = network ]; then
    for file in resolv.conf hosts; do
        rm -f "etc/$file"
        cp -L "/etc/$file" "etc/$file"
    done
fi
while [ "$1" != -- ]; do
    if [ -d "$2" ]; then mkdir -p ".$3"; else mkdir -p ".${3%/*}" && touch ".$3"; fi
    # Not what is mounted below it: a checkout that holds LAYER would bring the root's own /sys along once more, where
    # libvirt then looks for its cgroups.
    mount --bind "$2" ".$3"
    if [ "$1" = ro ]; then mount -o remount,bind,ro ".$3"; fi
    shift 3
done
shift
# Never chroot: setns, which libvirt uses for QEMU's own /dev, leaves a chroot, and its mknod and chown then hit the
# /dev of the machine.
pivot_root . mnt
umount -l /mnt
cd /
if [ "$network" != network ]; then ip link set lo up; fi
# This shell stays: it is process 1 here, and collects what nobody else waits for.
set +e
"$@"
exit $?
