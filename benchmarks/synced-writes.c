/* synced-writes DISK [BYTES PAUSE]
 *
 * Writes so many bytes (4 KiB; 1 MiB at most) somewhere in the first half of a disk, syncs, prints how many microseconds
 * that took, and rests for PAUSE of them (2000); for ever. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <linux/fs.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define PER_LINE 20

static long microseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000L + now.tv_nsec / 1000;
}

int main(int count, char **arguments)
{
    static char block[1 << 20] __attribute__((aligned(BLOCK)));
    unsigned long long size = 0;
    size_t length = count == 4 ? strtoul(arguments[2], NULL, 10) : BLOCK;
    unsigned long pause = count == 4 ? strtoul(arguments[3], NULL, 10) : 2000;
    int disk = count >= 2 ? open(arguments[1], O_RDWR | O_DIRECT) : -1;
    if (disk < 0 || length < BLOCK || length > sizeof block || ioctl(disk, BLKGETSIZE64, &size) != 0
        || size < 2 * length) {
        printf("bench: no disk to write to\n");
        return 1;
    }
    for (unsigned long number = 1;; number++) {
        /* Half of the disk holds data: there a backup has something to save before it is overwritten. */
        off_t at = (off_t)((unsigned long long)random() % (size / 2 / length)) * length;
        block[number % length] = (char)number;
        long begun = microseconds();
        if (pwrite(disk, block, length, at) != (ssize_t)length || fdatasync(disk) != 0) {
            printf("bench: a write failed\n");
            return 1;
        }
        printf("%ld ", microseconds() - begun);
        if (number % PER_LINE == 0) {
            printf("took\n");
            fflush(stdout);
        }
        usleep(pause);
    }
}
