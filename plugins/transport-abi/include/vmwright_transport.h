/*
 * The C ABI between a vmwright daemon and its transport plugins, version 1.0.
 *
 * A plugin NAME is a shared library libtransport_NAME.so with one symbol, a constant table:
 *
 *     const vmw_transport vmwright_transport_NAME_v1 = {
 *         .magic = VMW_MAGIC, .size = sizeof(vmw_transport), .major = VMW_MAJOR, .minor = VMW_MINOR,
 *         .name = VMW_TEXT("NAME"), .version = VMW_TEXT("1.2.3"),
 *         .dial_begin = ..., .dial_step = ..., .dial_free = ...,
 *     };
 *
 * What its functions owe the daemon is in the numbered clauses of src/contract.md; the numbers below refer to them.
 * This file only ever grows. A test compares every size, offset and number in it with the Rust definitions.
 */
#ifndef VMWRIGHT_TRANSPORT_H
#define VMWRIGHT_TRANSPORT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VMW_MAGIC UINT64_C(0x736e617274776d76) /* "vmwtrans", little-endian */
#define VMW_MAJOR 1u
#define VMW_MINOR 0u

/* What a call answers (8). Every negative number is a failure. */
typedef int32_t vmw_status;
#define VMW_READY 0
#define VMW_WAIT 1
#define VMW_FAILED (-1)      /* the system or the peer said no */
#define VMW_BAD_ADDRESS (-2) /* not an address of this transport */
#define VMW_UNSUPPORTED (-3) /* this transport does not do that */
#define VMW_PANICKED (-4)    /* the operation is lost, only free may follow (12.1) */

/* Bits of vmw_transport.flags (1.5). */
#define VMW_HOST_PORT UINT64_C(1) /* addresses are HOST:PORT, the host resolves them (4.3) */

/* Bits of vmw_progress.events (7.1). */
#define VMW_READABLE 1u
#define VMW_WRITABLE 2u

/* UTF-8, without an ending zero (4.1). */
typedef struct vmw_text {
    const char *bytes;
    size_t length;
} vmw_text;

#define VMW_TEXT(literal) { literal, sizeof(literal) - 1 }

/* Filled in by the host, lent for the call (4.2). */
typedef struct vmw_request {
    uint32_t size;
    uint32_t host_minor;
    vmw_text address;
} vmw_request;

/* What a step came to. The host sets size and clears the rest. */
typedef struct vmw_progress {
    uint32_t size;
    int32_t fd;              /* handed over when ready (6.1), lent when waiting (6.2), -1 for none */
    uint32_t events;
    uint32_t flags;          /* zero */
    uint64_t retry_after_us; /* 0 for never */
} vmw_progress;

/* Why a call failed (8.1). The host sets size, text and capacity and clears the rest. */
typedef struct vmw_failure {
    uint32_t size;
    int32_t os_error;
    char *text;
    size_t capacity;
    size_t length;
} vmw_failure;

/* Operations; only their plugin knows what is in them. */
typedef struct vmw_dial vmw_dial;
typedef struct vmw_listener vmw_listener;

/* The table (1). It grows at its tail. */
typedef struct vmw_transport {
    uint64_t magic;
    uint32_t size;
    uint32_t major;
    uint32_t minor;
    uint32_t needs_minor; /* the least minor version of a host that will do */
    uint64_t flags;
    vmw_text name;
    vmw_text version;

    /* Dialing (9). All three or none. */
    vmw_status (*dial_begin)(const vmw_request *request, vmw_dial **dial, vmw_failure *failure);
    vmw_status (*dial_step)(vmw_dial *dial, vmw_progress *progress, vmw_failure *failure);
    void (*dial_free)(vmw_dial *dial);

    /* Listening (10). All five or none. */
    vmw_status (*listen_begin)(const vmw_request *request, vmw_listener **listener, vmw_failure *failure);
    vmw_status (*listen_step)(vmw_listener *listener, vmw_progress *progress, vmw_failure *failure);
    vmw_status (*listen_accept)(vmw_listener *listener, vmw_progress *progress, vmw_failure *failure);
    vmw_status (*listen_address)(vmw_listener *listener, char *buffer, size_t capacity, size_t *length,
                                 vmw_failure *failure);
    void (*listen_free)(vmw_listener *listener);
} vmw_transport;

#ifdef __cplusplus
}
#endif

#endif
