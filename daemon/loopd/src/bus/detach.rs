//! The operation that detaches, for `org.loopd1.Manager` and `org.loopd1.Attachment`.

use super::authority::Request;
use super::call_error::CallError;
use super::context::{Call, Operation};
use loopd_engine::Snapshot;
use loopd_engine::kernel::DiskSequence;

/// Detaches an attachment.
pub struct Detach {
    /// What to detach.
    pub target: Target,
    /// Whether to detach on last close if the device is in use.
    pub lazy: bool,
}

/// What to detach.
pub enum Target {
    /// The attachment with this identity.
    Attachment(DiskSequence),
    /// The attachment of the device with this number, also one that loopd did not make.
    Device(u32),
}

impl Operation for Detach {
    type Object = Snapshot;
    type Output = ();

    fn method(&self) -> &'static str {
        "Detach"
    }

    async fn look_up(&self, call: &Call<'_>) -> Result<Snapshot, CallError> {
        match self.target {
            Target::Attachment(id) => call.find(id),
            Target::Device(number) => Ok(call.engine.locate(number).await?),
        }
    }

    fn requests<'a>(&self, attachment: &'a Snapshot) -> Vec<Request<'a>> {
        vec![Request::Change(attachment)]
    }

    async fn run(self, call: &Call<'_>, attachment: Snapshot) -> Result<(), CallError> {
        Ok(call.engine.detach(attachment.id, self.lazy).await?)
    }
}
