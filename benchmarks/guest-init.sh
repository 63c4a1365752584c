#!/bin/busybox sh
# The first and only program of the guest whose writes are timed.
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module" || echo "bench: cannot load $module"; done < /modules/order
while [ ! -b /dev/vda ]; do usleep 50000; done
case "$(cat /proc/cmdline)" in
    *bench.writes=hard*) exec synced-writes /dev/vda 262144 0 > /dev/ttyS0 ;;
esac
exec synced-writes /dev/vda > /dev/ttyS0
