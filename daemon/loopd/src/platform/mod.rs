//! The platform of the daemon: Linux and the system bus, or in a build with the feature `simulate` a simulated machine
//! and the session bus. Both modules have the same items, and no other module depends on the feature.

use std::sync::Arc;

use loopd_engine::kernel::Kernel;

#[cfg(not(feature = "simulate"))]
mod linux;
#[cfg(feature = "simulate")]
mod simulated;

#[cfg(not(feature = "simulate"))]
pub use linux::*;
#[cfg(feature = "simulate")]
pub use simulated::*;

/// The engine on this platform.
pub type Engine = loopd_engine::Engine<Platform>;
/// The same for several tasks.
pub type SharedEngine = Arc<Engine>;
/// A file of a caller, as the platform takes it.
pub type File = <Platform as Kernel>::File;
