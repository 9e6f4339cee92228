#![expect(
    unsafe_code,
    reason = "makes a process that borrows this one's memory until it is the program"
)]
//! How a child becomes the program it was launched as, without a copy of this process.
//!
//! A fork copies the page tables of the whole daemon, and every page that is written after it is copied once more: with
//! 200 MiB in use that took 8 ms for each guest, and 3.5 ms of faults later (measured; 0.13 ms without). So the child runs
//! in the memory of its parent, on a stack of its own, while the thread that made it stands still (`CLONE_VM`,
//! `CLONE_VFORK`; posix_spawn(3) does the same, but takes no lock). Its table of descriptors is a copy, so what it changes
//! there is its own.
//!
//! ```text
//!  this thread   all signals blocked ── clone ─┊ stands still ┊─ signals as before ── what the child wrote
//!  child                                       └ handlers off, session, descriptors, lock, signals ── exec
//! ```
//!
//! The child must not allocate, lock, panic or return: whatever it needs is made before it.
//!
//! Must not know what the program is.

use std::env;
use std::ffi::{CStr, CString, OsStr, OsString, c_char, c_int, c_void};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::fs::FlockOperation;
use rustix::io::{Errno, FdFlags};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

use super::Launch;

/// Room for the child, which calls nothing but thin wraps of system calls.
const STACK: usize = 64 << 10;
/// At its end, where an overrun must hurt nobody. No page of a machine that runs QEMU is larger.
const GUARD: usize = 64 << 10;

/// Starts it, and yields its pid and pidfd. A program that could not be executed has left nothing behind.
pub(super) fn spawn(launch: Launch) -> io::Result<(u32, OwnedFd)> {
    let Launch {
        program,
        arguments,
        descriptors,
        stderr,
        lock,
    } = launch;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let places = places(&program)?;
    let arguments = texts([program.into_os_string()].into_iter().chain(arguments))?;
    let variables = env::vars_os().map(|(name, value)| {
        let mut both = name;
        both.push("=");
        both.push(value);
        both
    });
    let variables = texts(variables)?;
    let plan = Plan {
        places: &places,
        arguments: pointers(&arguments),
        variables: pointers(&variables),
        descriptors: &descriptors,
        null: &null,
        stderr: &stderr,
        lock: &lock,
        failed: AtomicI32::new(0),
    };
    plan.check()?;
    plan.run()
}

/// Where to look for a program, as execvp(3) does: one without a slash in its name is looked for in `PATH`.
fn places(program: &Path) -> io::Result<Vec<CString>> {
    if program.as_os_str().as_bytes().contains(&b'/') {
        return Ok(vec![text(program.as_os_str().to_owned())?]);
    }
    let path = env::var_os("PATH").unwrap_or_else(|| OsStr::new("/bin:/usr/bin").to_owned());
    env::split_paths(&path)
        .map(|place| text(place.join(program).into_os_string()))
        .collect()
}

fn texts(all: impl Iterator<Item = OsString>) -> io::Result<Vec<CString>> {
    all.map(text).collect()
}

fn text(text: OsString) -> io::Result<CString> {
    CString::new(text.into_vec())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a zero byte in an argument"))
}

/// As execve(2) takes them. They are good for as long as the texts are.
fn pointers(texts: &[CString]) -> Vec<*const c_char> {
    let all = texts.iter().map(|text| text.as_ptr());
    all.chain([ptr::null()]).collect()
}

/// All that the child needs.
struct Plan<'a> {
    places: &'a [CString],
    arguments: Vec<*const c_char>,
    variables: Vec<*const c_char>,
    descriptors: &'a [OwnedFd],
    null: &'a File,
    stderr: &'a File,
    lock: &'a File,
    /// Why it is not the program: an errno, or zero.
    failed: AtomicI32,
}

impl Plan<'_> {
    /// The child's first three would take the place of a descriptor that has such a number here.
    fn check(&self) -> io::Result<()> {
        let files = [self.null, self.stderr, self.lock].map(AsRawFd::as_raw_fd);
        let given = self.descriptors.iter().map(AsRawFd::as_raw_fd);
        match given.chain(files).find(|number| *number <= 2) {
            None => Ok(()),
            Some(number) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "this process has no standard streams: descriptor {number} is another file"
                ),
            )),
        }
    }

    fn run(&self) -> io::Result<(u32, OwnedFd)> {
        let stack = Stack::new()?;
        let mut pidfd: RawFd = -1;
        // A handler of this process must not run in the child, which has its memory.
        let blocked = Blocked::all()?;
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
        let plan: *const Self = self;
        // SAFETY: the child runs on a stack of its own. The kernel keeps this thread, and so the plan and the stack, where
        // they are until the child has called exec or exit; what both can write is an atomic.
        let pid = unsafe {
            libc::clone(
                child,
                stack.top(),
                flags,
                plan.cast_mut().cast(),
                &raw mut pidfd,
            )
        };
        let cloned = match u32::try_from(pid) {
            Ok(pid) => Ok(pid),
            Err(_) => Err(io::Error::last_os_error()),
        };
        drop(blocked);
        let pid = cloned?;
        // SAFETY: the clone succeeded, so the kernel has put a new descriptor there, which nobody else knows.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        match self.failed.load(Ordering::Relaxed) {
            0 => Ok((pid, pidfd)),
            errno => {
                let options = rustix::process::WaitIdOptions::EXITED;
                let id = rustix::process::WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd));
                // It has exited. Where somebody else reaps the children of this process there is nothing to wait for.
                let _reaped = rustix::process::waitid(id, options);
                Err(io::Error::from_raw_os_error(errno))
            }
        }
    }

    /// What the child does, up to the program. Yields why that did not begin.
    fn become_program(&self) -> Errno {
        match self.prepare() {
            Ok(()) => self.execute(),
            Err(errno) => errno,
        }
    }

    fn prepare(&self) -> Result<(), Errno> {
        rustix::process::setsid()?;
        rustix::stdio::dup2_stdin(self.null)?;
        rustix::stdio::dup2_stdout(self.null)?;
        rustix::stdio::dup2_stderr(self.stderr)?;
        for descriptor in self.descriptors {
            rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
        }
        // Closing the file would unlock it, so the program gets it, too.
        rustix::io::fcntl_setfd(self.lock, FdFlags::empty())?;
        rustix::fs::fcntl_lock(self.lock, FlockOperation::NonBlockingLockExclusive)?;
        signals_by_default()
    }

    fn execute(&self) -> Errno {
        let mut why = Errno::NOENT;
        for place in self.places {
            let found = execve(place, &self.arguments, &self.variables);
            match found {
                Errno::NOENT | Errno::NOTDIR => {}
                // Another place may have one that we may execute. If none has, this is what to tell.
                Errno::ACCESS => why = found,
                _ => return found,
            }
        }
        why
    }
}

fn execve(path: &CStr, arguments: &[*const c_char], variables: &[*const c_char]) -> Errno {
    // SAFETY: the path is a text, and both lists are of pointers to texts and end with a null one.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), variables.as_ptr()) };
    last()
}

extern "C" fn child(plan: *mut c_void) -> c_int {
    // SAFETY: it is the plan of the thread that waits for us.
    let plan = unsafe { &*plan.cast_const().cast::<Plan<'_>>() };
    let errno = plan.become_program();
    plan.failed.store(errno.raw_os_error(), Ordering::Relaxed);
    // SAFETY: ends this process alone, and runs nothing of what its parent registered for its exit.
    unsafe { libc::_exit(127) }
}

/// What a program expects: no signal blocked, and none ignored that Rust ignores for itself. Handlers are taken away first,
/// since they would run in the memory of the parent.
fn signals_by_default() -> Result<(), Errno> {
    for signal in 1..=libc::SIGRTMAX() {
        let mut now = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: asks only, and there is room for the answer.
        let known = unsafe { libc::sigaction(signal, ptr::null(), now.as_mut_ptr()) } == 0;
        // SAFETY: zeroes are a `sigaction`: the default one.
        let now = unsafe { now.assume_init() }.sa_sigaction;
        let stays = now == libc::SIG_DFL || (now == libc::SIG_IGN && signal != libc::SIGPIPE);
        // Those that the C library keeps for itself are not known, and come to no process of one thread.
        if !known || stays {
            continue;
        }
        // SAFETY: sets the default action, which zeroes are. The child's actions are its own: no `CLONE_SIGHAND`.
        let set = unsafe {
            let default = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
            libc::sigaction(signal, &raw const default, ptr::null_mut())
        };
        if set != 0 {
            return Err(last());
        }
    }
    let mut none = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: there is room for the set, which is made before it is used.
    let set = unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut())
    };
    if set == 0 { Ok(()) } else { Err(last()) }
}

/// In the child this reads and writes the parent's `errno`: that thread stands still.
fn last() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

/// This thread with all signals blocked, until dropped.
struct Blocked {
    before: libc::sigset_t,
}

impl Blocked {
    fn all() -> io::Result<Self> {
        let mut all = MaybeUninit::<libc::sigset_t>::zeroed();
        let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: there is room for both sets, and the first is made before it is used.
        let error = unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr())
        };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: the call has written it.
        let before = unsafe { before.assume_init() };
        Ok(Self { before })
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: that set was this thread's.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut());
        }
    }
}

/// A stack, which grows down to a guard.
struct Stack(*mut c_void);

impl Stack {
    fn new() -> io::Result<Self> {
        let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: new memory, at a place that the kernel chooses.
        let bottom =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), GUARD + STACK, rights, flags)? };
        let stack = Self(bottom);
        // SAFETY: the lower end of what was mapped just now, which nobody uses.
        unsafe { rustix::mm::mprotect(bottom, GUARD, MprotectFlags::empty())? };
        Ok(stack)
    }

    /// Where it begins.
    fn top(&self) -> *mut c_void {
        // SAFETY: one past the end of what was mapped.
        unsafe { self.0.byte_add(GUARD + STACK) }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: it was mapped so, and no child has it any more. A failure leaves it mapped, which hurts nobody.
        let _unmapped = unsafe { rustix::mm::munmap(self.0, GUARD + STACK) };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io::PipeReader;
    use std::os::fd::AsFd;
    use std::thread;

    use rustix::process::{WaitId, WaitIdOptions};

    use super::*;
    use crate::process::tests::sh;
    use crate::process::{lock_holder, number};

    fn status(pidfd: &OwnedFd) -> Option<i32> {
        let ended = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
        ended.unwrap().unwrap().exit_status()
    }

    /// A launch of that script, which may write to its descriptor `$out`.
    fn writing(script: &str) -> (Launch, PipeReader) {
        let (read, write) = io::pipe().unwrap();
        let write = OwnedFd::from(write);
        let script = format!("out={}; {script}", number(&write));
        let launch = Launch {
            descriptors: vec![write],
            ..sh(&script)
        };
        (launch, read)
    }

    fn said(launch: Launch, read: PipeReader) -> String {
        let (_, pidfd) = spawn(launch).unwrap();
        let text = io::read_to_string(read).unwrap();
        assert_eq!(status(&pidfd), Some(0));
        text
    }

    #[test]
    fn a_program_that_cannot_be_executed_is_told_as_the_system_says_it_and_holds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, lock) = (dir.path().join("plain"), dir.path().join("lock"));
        std::fs::write(&plain, "").unwrap();
        let cases = [
            (dir.path().join("none"), io::ErrorKind::NotFound),
            (plain, io::ErrorKind::PermissionDenied),
            (
                "vmwright-has-no-such-program".into(),
                io::ErrorKind::NotFound,
            ),
            ("a\0b".into(), io::ErrorKind::InvalidInput),
        ];
        for (program, expected) in cases {
            let launch = Launch {
                program: program.clone(),
                lock: File::create(&lock).unwrap(),
                ..sh("")
            };
            let error = spawn(launch).expect_err("it is no program");
            assert_eq!(error.kind(), expected, "{program:?}: {error}");
            assert_eq!(lock_holder(&lock).unwrap(), None);
        }
    }

    #[test]
    fn a_program_without_a_slash_is_found_on_the_path_with_the_variables_of_this_process() {
        let (launch, read) = writing("echo \"$PATH\" > /proc/self/fd/$out");
        let launch = Launch {
            program: "sh".into(),
            ..launch
        };
        let path = env::var("PATH").unwrap();
        assert_eq!(said(launch, read).trim_end(), path);
    }

    #[test]
    fn a_child_has_what_it_was_given_and_not_what_this_process_has_open() {
        let (launch, read) = writing("exec ls /proc/self/fd > /proc/self/fd/$out");
        // Under a number that the child does not come to by itself.
        let own = rustix::io::fcntl_dupfd_cloexec(&launch.stderr, 500).unwrap();
        let given = [
            0,
            1,
            2,
            number(&launch.descriptors[0]),
            launch.lock.as_raw_fd(),
        ];
        let told = said(launch, read);
        let open: BTreeSet<i32> = told.lines().map(|line| line.parse().unwrap()).collect();
        assert!(given.iter().all(|number| open.contains(number)), "{open:?}");
        assert!(!open.contains(&number(&own)), "{open:?}");
    }

    fn signals(status: &str, which: &str) -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(which));
        u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
    }

    #[test]
    fn a_child_blocks_no_signal_and_ignores_none_that_rust_ignores() {
        let (launch, read) = writing("exec cat /proc/self/status > /proc/self/fd/$out");
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        let pipe = 1 << (libc::SIGPIPE - 1);
        assert_ne!(signals(&own, "SigIgn:") & pipe, 0, "else it shows nothing");
        let blocked = Blocked::all().unwrap();
        let told = said(launch, read);
        drop(blocked);
        assert_eq!(signals(&told, "SigBlk:"), 0);
        assert_eq!(signals(&told, "SigIgn:"), signals(&own, "SigIgn:") & !pipe);
    }

    #[test]
    fn what_this_thread_blocked_it_blocks_afterwards_and_nothing_else() {
        let mask = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            signals(&status, "SigBlk:")
        };
        let before = mask();
        let (_, pidfd) = spawn(sh("exit 0")).unwrap();
        assert_eq!(mask(), before);
        assert_eq!(status(&pidfd), Some(0));
    }

    #[test]
    fn many_are_launched_at_once() {
        thread::scope(|scope| {
            for number in 0..8 {
                scope.spawn(move || {
                    for _ in 0..20 {
                        let (_, pidfd) = spawn(sh(&format!("exit {number}"))).unwrap();
                        assert_eq!(status(&pidfd), Some(number));
                    }
                });
            }
        });
    }
}
