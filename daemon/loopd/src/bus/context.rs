//! The state that the objects on the bus share, and the path of every method call.

use std::os::fd::AsFd;
use std::sync::Arc;

use loopd_common::CallerFile;
use loopd_dbus::transport::{Descriptors, USED_TWICE};
use loopd_dbus::{Error, ErrorKind, ErrorReply, InvalidOption};
use tracing::info;
use zbus::message::Header;

use super::authority::{Authority, Request};
use super::call_error::CallError;
use super::caller::{Caller, Callers};
use super::large_replies::LargeReplies;
use super::objects::Objects;
use loopd_engine::kernel::{DiskSequence, FileFacts};
use loopd_engine::{Caller as _, Snapshot};

use crate::platform::{self, File, SharedEngine};

/// The state that all objects on the bus share. The engine is private: a method reaches it through [`Context::call`] only.
#[derive(Clone)]
pub struct Context {
    engine: SharedEngine,
    authority: Arc<Authority>,
    callers: Arc<Callers>,
    descriptors: Descriptors,
    objects: Objects,
    large_replies: LargeReplies,
}

/// A method call whose arguments have been decoded and validated.
pub trait Operation: Send + Sized {
    /// The object of the operation.
    type Object: Send + Sync;
    /// The result, from which the method makes its reply.
    type Output: Send;
    /// Whether the operation may change attachments. If so, the reply follows the signals of its changes.
    const CHANGES_ATTACHMENTS: bool = true;

    /// The name of the method, for the log.
    fn method(&self) -> &'static str;

    /// Looks at the object, without any effect.
    ///
    /// # Errors
    /// The object does not exist, or cannot be used.
    fn look_up(&self, call: &Call<'_>) -> impl Future<Output = Result<Self::Object, CallError>> + Send;

    /// The requests to authorize, in this order.
    fn requests<'a>(&self, object: &'a Self::Object) -> Vec<Request<'a>>;

    /// Runs the authorized operation.
    ///
    /// # Errors
    /// The operation failed, and all its effects were undone.
    fn run(
        self,
        call: &Call<'_>,
        object: Self::Object,
    ) -> impl Future<Output = Result<Self::Output, CallError>> + Send;
}

/// A call in progress: its caller, and the state that its operation may use.
pub struct Call<'a> {
    /// The caller, watched and counted until the call ends.
    pub caller: Caller,
    /// The attachments.
    pub engine: &'a SharedEngine,
    /// The objects on the bus.
    pub objects: &'a Objects,
    /// Builds replies of unbounded size.
    pub large_replies: &'a LargeReplies,
    needs_authorization: bool,
}

impl Context {
    /// A context without objects.
    #[must_use]
    pub fn new(
        engine: SharedEngine,
        authority: Authority,
        callers: Arc<Callers>,
        descriptors: Descriptors,
    ) -> Self {
        Self {
            engine,
            authority: Arc::new(authority),
            callers,
            descriptors,
            objects: Objects::default(),
            large_replies: LargeReplies::default(),
        }
    }

    /// The path of every method call: identifies the caller, looks at the object, authorizes the requests,
    /// runs the operation, waits until its signals have been emitted, and logs its failure.
    ///
    /// # Errors
    /// Those of the operation and of each step before it.
    pub async fn call<O: Operation>(
        &self,
        header: &Header<'_>,
        operation: O,
    ) -> Result<O::Output, ErrorReply> {
        let method = operation.method();
        let caller = self.callers.identify(header).await?;
        let call = Call {
            needs_authorization: self.authority.needs_authorization(&caller),
            caller,
            engine: &self.engine,
            objects: &self.objects,
            large_replies: &self.large_replies,
        };
        let object = operation.look_up(&call).await?;
        for request in operation.requests(&object) {
            self.authority.authorize(&call.caller, request).await?;
        }
        let result = operation.run(&call, object).await;
        if O::CHANGES_ATTACHMENTS {
            self.engine.flush_events().await;
        }
        Ok(result.inspect_err(|error| call.log_failure(method, error))?)
    }

    /// Takes the file that a descriptor in a message stands for.
    ///
    /// # Errors
    /// `InvalidArgs` if the file was taken before.
    pub fn claim(&self, placeholder: impl AsFd) -> Result<File, CallError> {
        Ok(platform::file(self.take(placeholder)?)?)
    }

    /// Takes a file that is not to be attached, such as a secret: it may be a pipe, and is not looked at.
    ///
    /// # Errors
    /// As [`Context::claim`].
    pub fn claim_unseen(&self, placeholder: impl AsFd) -> Result<File, CallError> {
        Ok(platform::unseen_file(self.take(placeholder)?))
    }

    fn take(&self, placeholder: impl AsFd) -> Result<CallerFile, CallError> {
        let file = self.descriptors.claim(placeholder);
        file.ok_or_else(|| Error::new(ErrorKind::InvalidArgs, USED_TWICE).into())
    }

    /// The objects on the bus.
    #[must_use]
    pub fn objects(&self) -> &Objects {
        &self.objects
    }
}

impl Call<'_> {
    /// An attachment, without its partitions.
    ///
    /// # Errors
    /// `UnknownObject`.
    pub fn find(&self, id: DiskSequence) -> Result<Snapshot, CallError> {
        self.engine.outline(id).ok_or_else(|| {
            let message = format!("the attachment {id} does not exist any more");
            Error::new(ErrorKind::UnknownObject, message).into()
        })
    }

    /// Looks at a file to attach; `None` if attaching it needs no authorization.
    ///
    /// # Errors
    /// `InvalidBackingFile`.
    pub async fn examine_for_authorization(&self, file: &File) -> Result<Option<FileFacts>, CallError> {
        if !self.needs_authorization {
            return Ok(None);
        }
        Ok(Some(self.engine.examine(file).await?))
    }

    fn log_failure(&self, method: &str, error: &CallError) {
        let (uid, client, message) = (self.caller.uid(), self.caller.client(), error.message());
        info!(uid, %client, causes = error.causes(), "{method} failed: {message}");
    }
}

/// The error for an invalid option.
pub fn invalid_option(option: InvalidOption) -> Error {
    Error::new(ErrorKind::InvalidArgs, option.to_string())
}
