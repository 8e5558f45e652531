//! The allocator's memory.
#![allow(unsafe_code)]

/// Returns the pages that the allocator no longer uses to the kernel. glibc does so only with those at the end of its
/// heap, where one object that is in use keeps all others.
#[cfg(target_env = "gnu")]
pub fn return_free_pages() {
    // SAFETY: no arguments but a number of bytes to keep; malloc_trim(3) is safe in any thread.
    unsafe { nix::libc::malloc_trim(0) };
}

/// Other allocators are left alone.
#[cfg(not(target_env = "gnu"))]
pub fn return_free_pages() {}
