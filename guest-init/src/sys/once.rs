//! Static memory that is handed out once, so that the agent allocates nothing while it runs.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

/// A static value that the first to ask gets for ever. With an all-zero value it takes no room in
/// the file, and no memory until it is touched.
pub(crate) struct TakeOnce<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reachable only through `take`, which lets one caller ever have it.
unsafe impl<T: Send> Sync for TakeOnce<T> {}

impl<T> TakeOnce<T> {
    pub(crate) const fn new(value: T) -> Self {
        TakeOnce { taken: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    // The flag is what makes a mutable reference out of a shared one sound.
    #[allow(clippy::mut_from_ref)]
    pub(crate) fn take(&'static self) -> Option<&'static mut T> {
        if self.taken.swap(true, Ordering::AcqRel) {
            return None;
        }
        // SAFETY: `taken` was false and is never reset, so this is the only reference there will be.
        Some(unsafe { &mut *self.value.get() })
    }
}
