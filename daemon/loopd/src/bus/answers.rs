//! Answers that grow with what is attached: at any moment one of them at most is made and sent.

use std::sync::Arc;

use tokio::sync::Semaphore;
use zbus::object_server::ResponseDispatchNotifier;

/// An answer that is noticed when it has been sent.
pub type Answer<T> = ResponseDispatchNotifier<T>;

/// Lets one answer at a time be made; clones are the same one.
#[derive(Clone)]
pub struct Answers(Arc<Semaphore>);

impl Default for Answers {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

impl Answers {
    /// Makes an answer when the one before has been sent.
    pub async fn make<T>(&self, answer: impl FnOnce() -> T) -> Answer<T> {
        let turn = Arc::clone(&self.0).acquire_owned().await;
        let (answer, sent) = Answer::new(answer());
        tokio::spawn(async move {
            sent.await;
            drop(turn);
        });
        answer
    }
}
