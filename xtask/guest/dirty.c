/*
 * dirty MB [MB_PER_SECOND]: rewrites MB megabytes over and over, one word a page, so that
 * a migration or a save has something to run after. Rate 0, or none, is as fast as it goes.
 *
 * Every word is checked before it is rewritten. Memory that was lost or exchanged on the way
 * to another QEMU ends the program with a line on the console, which a test looks for.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE 4096
#define PER_SECOND 100 /* slices; short ones make a steady rate */

static unsigned long number(const char *text) {
    char *end;
    unsigned long value = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || value > 1 << 20) {
        fprintf(stderr, "dirty: '%s' is not a number of megabytes\n", text);
        exit(2);
    }
    return value;
}

int main(int argc, char **argv) {
    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: dirty MB [MB_PER_SECOND]\n");
        return 2;
    }
    unsigned long megabytes = number(argv[1]);
    unsigned long rate = argc == 3 ? number(argv[2]) : 0;
    unsigned long pages = megabytes * (1 << 20) / PAGE;
    unsigned long slice = rate ? rate * (1 << 20) / PAGE / PER_SECOND : 0;
    if (!pages || (rate && !slice)) {
        fprintf(stderr, "dirty: nothing to do for '%s'\n", argv[1]);
        return 2;
    }

    char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("dirty: mmap");
        return 1;
    }

    struct timespec due;
    clock_gettime(CLOCK_MONOTONIC, &due);
    unsigned long done = 0;
    for (unsigned long pass = 0;; pass++) {
        for (unsigned long page = 0; page < pages; page++) {
            volatile unsigned long *word = (unsigned long *)(memory + page * PAGE);
            unsigned long expected = pass ? (pass - 1) * pages + page + 1 : 0;
            if (*word != expected) {
                FILE *console = fopen("/dev/console", "w");
                fprintf(console ? console : stderr, "VMWRIGHT CORRUPT page %lu: %lu, not %lu\n",
                        page, *word, expected);
                return 1;
            }
            *word = pass * pages + page + 1;
            if (slice && ++done % slice == 0) {
                due.tv_nsec += 1000000000 / PER_SECOND;
                if (due.tv_nsec >= 1000000000) {
                    due.tv_nsec -= 1000000000;
                    due.tv_sec++;
                }
                /* An absolute time: a guest that was held up makes up for it, and keeps its rate. */
                clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
            }
        }
    }
}
