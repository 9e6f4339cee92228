/*
 * The abstract: transport, in C. A target's address is the name of a unix socket in Linux' abstract namespace: 1 to 107 bytes,
 * no file, gone with its listener. Who may connect is up to the network namespace; who did, the host asks the kernel.
 *
 * Must not know the host, deadlines, or who the peer is. Numbers refer to the clauses of transport-abi/src/contract.md.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "vmwright_transport.h"

/* How soon a full backlog is tried again: a unix socket never signals that there is room. */
#define BACKLOG_RETRY_US 2000
/* As many as the kernel allows; it caps by net.core.somaxconn. */
#define BACKLOG 4096

struct vmw_dial {
    int socket; /* -1 once it is handed over */
    struct sockaddr_un address;
    socklen_t address_size;
};

struct vmw_listener {
    int socket;
    struct sockaddr_un address;
    socklen_t address_size;
};

/* Reports a failure (8.1): what failed, and the errno behind it or 0. */
static vmw_status fail(vmw_failure *failure, vmw_status status, int os_error, const char *text) {
    size_t length = strlen(text);
    if (length > failure->capacity)
        length = failure->capacity;
    if (length > 0) /* text may be anything else (4.1), and memcpy minds */
        memcpy(failure->text, text, length);
    failure->length = length;
    failure->os_error = os_error;
    return status;
}

/* The first byte of an abstract name is zero, and its size says where it ends. */
static vmw_status read_address(const vmw_request *request, struct sockaddr_un *address, socklen_t *size,
                               vmw_failure *failure) {
    size_t length = request->address.length;
    if (length == 0 || length > sizeof address->sun_path - 1)
        return fail(failure, VMW_BAD_ADDRESS, 0, "expected a name of 1 to 107 bytes");
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    memcpy(address->sun_path + 1, request->address.bytes, length);
    *size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
    return VMW_READY;
}

static int make_socket(void) {
    return socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
}

static vmw_status dial_begin(const vmw_request *request, vmw_dial **dial, vmw_failure *failure) {
    vmw_dial *made = malloc(sizeof *made);
    if (!made)
        return fail(failure, VMW_FAILED, ENOMEM, "make room for a dial");
    vmw_status status = read_address(request, &made->address, &made->address_size, failure);
    if (status == VMW_READY && (made->socket = make_socket()) < 0)
        status = fail(failure, VMW_FAILED, errno, "make a unix socket");
    if (status != VMW_READY) {
        free(made); /* nothing is left to free (9.1) */
        return status;
    }
    *dial = made;
    return VMW_READY;
}

static vmw_status dial_step(vmw_dial *dial, vmw_progress *progress, vmw_failure *failure) {
    int answer;
    do
        answer = connect(dial->socket, (const struct sockaddr *)&dial->address, dial->address_size);
    while (answer != 0 && errno == EINTR);
    if (answer == 0) {
        progress->fd = dial->socket; /* the host's from here on (6.1) */
        dial->socket = -1;
        return VMW_READY;
    }
    if (errno == EAGAIN) {
        progress->retry_after_us = BACKLOG_RETRY_US;
        return VMW_WAIT;
    }
    return fail(failure, VMW_FAILED, errno, "connect");
}

static void dial_free(vmw_dial *dial) {
    if (dial->socket >= 0)
        close(dial->socket);
    free(dial);
}

static vmw_status listen_begin(const vmw_request *request, vmw_listener **listener, vmw_failure *failure) {
    vmw_listener *made = malloc(sizeof *made);
    if (!made)
        return fail(failure, VMW_FAILED, ENOMEM, "make room for a listener");
    made->socket = -1;
    vmw_status status = read_address(request, &made->address, &made->address_size, failure);
    if (status == VMW_READY && (made->socket = make_socket()) < 0)
        status = fail(failure, VMW_FAILED, errno, "make a unix socket");
    if (status == VMW_READY && bind(made->socket, (const struct sockaddr *)&made->address, made->address_size) != 0)
        status = fail(failure, VMW_FAILED, errno, "bind");
    if (status == VMW_READY && listen(made->socket, BACKLOG) != 0)
        status = fail(failure, VMW_FAILED, errno, "listen");
    if (status != VMW_READY) {
        if (made->socket >= 0)
            close(made->socket);
        free(made);
        return status;
    }
    *listener = made;
    return VMW_READY;
}

/* Bound since listen_begin; there is nothing to wait for. */
static vmw_status listen_step(vmw_listener *listener, vmw_progress *progress, vmw_failure *failure) {
    (void)listener;
    (void)progress;
    (void)failure;
    return VMW_READY;
}

static vmw_status listen_accept(vmw_listener *listener, vmw_progress *progress, vmw_failure *failure) {
    int accepted;
    do
        accepted = accept4(listener->socket, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    while (accepted < 0 && errno == EINTR);
    if (accepted >= 0) {
        progress->fd = accepted;
        return VMW_READY;
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK) {
        progress->fd = listener->socket; /* lent: open and the same until the next call (6.2) */
        progress->events = VMW_READABLE;
        return VMW_WAIT;
    }
    return fail(failure, VMW_FAILED, errno, "accept");
}

static vmw_status listen_address(vmw_listener *listener, char *buffer, size_t capacity, size_t *length,
                                 vmw_failure *failure) {
    size_t name = listener->address_size - offsetof(struct sockaddr_un, sun_path) - 1;
    if (name > capacity)
        return fail(failure, VMW_FAILED, 0, "tell the address: the host has too little room");
    memcpy(buffer, listener->address.sun_path + 1, name);
    *length = name;
    return VMW_READY;
}

static void listen_free(vmw_listener *listener) {
    close(listener->socket); /* the name goes with it; accepted connections do not (11.2) */
    free(listener);
}

extern const vmw_transport vmwright_transport_abstract_v1;
const vmw_transport vmwright_transport_abstract_v1 = {
    .magic = VMW_MAGIC,
    .size = sizeof(vmw_transport),
    .major = VMW_MAJOR,
    .minor = VMW_MINOR,
    .needs_minor = 0,
    .flags = 0,
    .name = VMW_TEXT("abstract"),
    .version = VMW_TEXT("0.1.0"),
    .dial_begin = dial_begin,
    .dial_step = dial_step,
    .dial_free = dial_free,
    .listen_begin = listen_begin,
    .listen_step = listen_step,
    .listen_accept = listen_accept,
    .listen_address = listen_address,
    .listen_free = listen_free,
};
