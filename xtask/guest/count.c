/*
 * count DISK: counts in the first block of the disk, ten times a second, past the guest's own cache.
 *
 * Each time it looks first whether the disk still has the number that it wrote last. A second copy of this guest that
 * runs, or has run, on the same disk has counted on: then this program ends with a line on the console, which a test
 * looks for. What it finds at its own start is where it begins.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096 /* the largest that a disk may want whole */
#define PAUSE 100000000

static int fail(const char *what, unsigned long wanted) {
    FILE *console = fopen("/dev/console", "w");
    fprintf(console ? console : stderr, "VMWRIGHT CORRUPT disk: %s, where it had %lu: %m\n", what, wanted);
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: count DISK\n");
        return 2;
    }
    int disk = open(argv[1], O_RDWR | O_DIRECT | O_SYNC);
    char *block = aligned_alloc(BLOCK, BLOCK);
    if (disk < 0 || !block) {
        perror("count");
        return 1;
    }
    unsigned long last = 0;
    struct timespec pause = {0, PAUSE};
    for (int is_first = 1;; is_first = 0) {
        if (pread(disk, block, BLOCK, 0) != BLOCK)
            return fail("cannot be read", last);
        block[BLOCK - 1] = 0;
        unsigned long found = strtoul(block, NULL, 10);
        if (!is_first && found != last) {
            char what[64];
            snprintf(what, sizeof what, "has %lu", found);
            return fail(what, last);
        }
        last = found + 1;
        memset(block, 0, BLOCK);
        snprintf(block, BLOCK, "%lu\n", last);
        if (pwrite(disk, block, BLOCK, 0) != BLOCK)
            return fail("cannot be written", last);
        nanosleep(&pause, NULL);
    }
}
