//! Replies whose size grows with the number of attachments. Only one is built and sent at a time, which limits the
//! memory that they take.

use std::sync::Arc;

use tokio::sync::Semaphore;
use zbus::object_server::ResponseDispatchNotifier;

/// A reply that signals when it has been sent.
pub type LargeReply<T> = ResponseDispatchNotifier<T>;

/// Builds one reply at a time. Clones share the limit.
#[derive(Clone)]
pub struct LargeReplies(Arc<Semaphore>);

impl Default for LargeReplies {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

impl LargeReplies {
    /// Waits until the previous reply has been sent, then builds this one.
    pub async fn build<T>(&self, build: impl FnOnce() -> T) -> LargeReply<T> {
        let permit = Arc::clone(&self.0).acquire_owned().await;
        let (reply, sent) = LargeReply::new(build());
        tokio::spawn(async move {
            sent.await;
            drop(permit);
        });
        reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reply_is_built_when_the_previous_one_is_sent() {
        let replies = LargeReplies::default();
        let first = replies.build(|| ()).await;
        let second = tokio::spawn({
            let replies = replies.clone();
            async move { drop(replies.build(|| ()).await) }
        });
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        drop(first);
        second.await.unwrap();
    }
}
