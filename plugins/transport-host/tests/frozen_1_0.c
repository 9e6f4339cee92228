/*
 * A plugin as it was written against version 1.0 of the ABI, with that version's declarations in it instead of the header. It
 * stands for the plugins that lie on other people's disks: never edit it, and never let it fail to load.
 *
 * Its target's address does not matter: the peer says "1.0" and hangs up.
 */
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct text { const char *bytes; size_t length; };
struct request { uint32_t size; uint32_t host_minor; struct text address; };
struct progress { uint32_t size; int32_t fd; uint32_t events; uint32_t flags; uint64_t retry_after_us; };
struct failure { uint32_t size; int32_t os_error; char *text; size_t capacity; size_t length; };
struct dial { int ours, theirs; };

struct table {
    uint64_t magic;
    uint32_t size, major, minor, needs_minor;
    uint64_t flags;
    struct text name, version;
    int32_t (*dial_begin)(const struct request *, struct dial **, struct failure *);
    int32_t (*dial_step)(struct dial *, struct progress *, struct failure *);
    void (*dial_free)(struct dial *);
    void *listening[5];
};

static int32_t begin(const struct request *request, struct dial **dial, struct failure *failure) {
    (void)request;
    int pair[2];
    struct dial *made = malloc(sizeof *made);
    if (!made || socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) != 0) {
        failure->os_error = errno;
        free(made);
        return -1;
    }
    made->ours = pair[0];
    made->theirs = pair[1];
    *dial = made;
    return 0;
}

static int32_t step(struct dial *dial, struct progress *progress, struct failure *failure) {
    if (send(dial->ours, "1.0", 3, MSG_NOSIGNAL) != 3) {
        failure->os_error = errno;
        return -1;
    }
    progress->fd = dial->theirs;
    dial->theirs = -1;
    return 0;
}

static void finish(struct dial *dial) {
    close(dial->ours);
    if (dial->theirs >= 0)
        close(dial->theirs);
    free(dial);
}

const struct table vmwright_transport_frozen_v1 = {
    .magic = UINT64_C(0x736e617274776d76),
    .size = sizeof(struct table),
    .major = 1,
    .minor = 0,
    .name = { "frozen", 6 },
    .version = { "2026", 4 },
    .dial_begin = begin,
    .dial_step = step,
    .dial_free = finish,
};
