#!/bin/busybox sh
# The first and only program of the lab's Linux guest: it writes to its disks for ever, and says so on the console.
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module" || echo "lab: cannot load $module"; done < /modules/order

while [ ! -b /dev/vda ]; do usleep 50000; done
mount -t ext4 -o discard /dev/vda /disk || { echo "lab: cannot mount /dev/vda"; exec sleep 999999; }
mkdir -p /disk/files
sectors=0
[ -b /dev/vdb ] && sectors=$(cat /sys/block/vdb/size)
chunks=$((sectors / 128)) # of 64 KiB

if [ -x /bin/qemu-ga ]; then
    # What udev would do: the agent's port under its name.
    mkdir -p /dev/virtio-ports
    for port in /sys/class/virtio-ports/*; do ln -s "/dev/${port##*/}" "/dev/virtio-ports/$(cat "$port/name")"; done
    qemu-ga --daemonize --path=/dev/virtio-ports/org.qemu.guest_agent.0 --statedir=/tmp --pidfile=/tmp/qemu-ga.pid
fi

echo "lab: guest is writing"
count=0
while true; do
    count=$((count + 1))
    # 40 names in turn, of 64 to 448 KiB: at most 18 MiB are in use, so the disk never fills.
    file=/disk/files/$((count % 40))
    case $((count % 5)) in
        0) rm -f "$file" ;;
        1) dd if=/dev/urandom of="$file" bs=65536 count=1 seek=1 conv=notrunc,fsync 2>/dev/null ;; # overwrite a part
        *) dd if=/dev/urandom of="$file" bs=65536 count=$((1 + count % 7)) 2>/dev/null ;;
    esac
    echo "$count" >> /disk/count
    echo "$count" >> /disk/written # all of them: what a backup holds of it is a beginning
    if [ "$chunks" -gt 0 ]; then
        place=$(((count * 37) % chunks))
        case $((count % 6)) in
            0) dd if=/dev/zero of=/dev/vdb bs=65536 count=1 seek="$place" conv=notrunc 2>/dev/null ;;
            1) blkdiscard -o $((place * 65536)) -l 65536 /dev/vdb 2>/dev/null ;;
            *) dd if=/dev/urandom of=/dev/vdb bs=65536 count=1 seek="$place" conv=notrunc 2>/dev/null ;;
        esac
    fi
    [ $((count % 10)) -eq 0 ] && { sync; echo "lab: wrote $count"; }
    [ $((count % 50)) -eq 0 ] && { fstrim /disk 2>/dev/null; : > /disk/count; }
    usleep 50000
done
