//! Runs test code in a thread that cannot open a file.

use std::fs::File;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use crate::error::errno_of;

/// Runs `test` while every call that needs a new descriptor fails with `EMFILE`. Other threads are not affected.
pub fn without_descriptors<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    let in_thread = || {
        // A descriptor table of this thread alone, which the kernel closes with the thread.
        unshare(CloneFlags::CLONE_FILES).unwrap();
        let file = File::open("/").unwrap();
        let mut copies = Vec::new();
        let full = loop {
            match file.try_clone() {
                Ok(copy) => copies.push(copy),
                Err(error) => break errno_of(&error),
            }
        };
        assert_eq!(full, Errno::EMFILE);
        test()
    };
    std::thread::scope(|scope| scope.spawn(in_thread).join().unwrap())
}
