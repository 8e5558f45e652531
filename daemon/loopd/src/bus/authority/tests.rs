//! Every decision of the authority, with a fake polkit at the other end of a private connection.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_lite::StreamExt;
use loopd_common::{Lifetime, State as AttachmentState};
use loopd_engine::kernel::{Device, DiskSequence, FileEnd, FileIdentity, FileSystem};
use loopd_engine::{Limits, Ownership};
use zbus::connection::Builder;
use zbus::message::Type;
use zbus::wire::OwnedVariant;
use zbus::{Guid, Message, MessageStream};

use super::*;
use crate::bus::clients::Clients;

const CLIENT: &str = ":1.7";
const UID: u32 = 1000;
const OTHER_UID: u32 = 1001;

/// How the fake polkit replies to a check.
#[derive(Clone, Copy, Debug)]
enum Reply {
    /// A prompt is needed, and stays open.
    Prompt,
    Result {
        is_authorized: bool,
        is_challenge: bool,
        is_dismissed: bool,
    },
    Error,
    /// A reply of another type.
    Invalid,
    None,
    /// No reply: the connection is closed.
    Disconnect,
}

const YES: Reply = Reply::Result { is_authorized: true, is_challenge: false, is_dismissed: false };
const NO: Reply = Reply::Result { is_authorized: false, is_challenge: false, is_dismissed: false };
const CHALLENGE: Reply = Reply::Result { is_authorized: false, is_challenge: true, is_dismissed: false };
const DISMISSED: Reply = Reply::Result { is_authorized: false, is_challenge: true, is_dismissed: true };

/// A received check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Check {
    subject_kind: String,
    subject_name: String,
    action: String,
    device: String,
    file: String,
    owner: String,
    is_interactive: bool,
    cancellation_id: String,
}

#[derive(Default)]
struct State {
    checks: Vec<Check>,
    cancelled: Vec<String>,
}

#[derive(Clone, Default)]
struct FakePolkit(Arc<Mutex<State>>);

type Subject = (String, HashMap<String, OwnedVariant>);

impl FakePolkit {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn checks(&self) -> Vec<Check> {
        self.state().checks.clone()
    }

    fn last_check(&self) -> Check {
        self.checks().pop().expect("polkit was asked")
    }

    async fn run(self, connection: Connection, reply: Reply) {
        let mut messages = MessageStream::from(&connection);
        while let Some(Ok(message)) = messages.next().await {
            let header = message.header();
            if message.message_type() != Type::MethodCall {
                continue;
            }
            match header.member().map(|member| member.as_str()) {
                Some("CheckAuthorization") => self.record_check(&message),
                Some("CancelCheckAuthorization") => {
                    self.state().cancelled.push(message.body().deserialize().unwrap());
                    connection.reply(&header, &()).await.unwrap();
                    continue;
                }
                member => panic!("{member:?} was called"),
            }
            match reply {
                Reply::Result { is_authorized, is_challenge, is_dismissed } => {
                    let details: HashMap<&str, &str> =
                        is_dismissed.then_some(("polkit.dismissed", "true")).into_iter().collect();
                    let result = ((is_authorized, is_challenge, details),);
                    connection.reply(&header, &result).await.unwrap();
                }
                Reply::Error => {
                    let name = "org.freedesktop.PolicyKit1.Error.Failed";
                    connection.reply_error(&header, name, &"failed").await.unwrap();
                }
                Reply::Invalid => connection.reply(&header, &"yes").await.unwrap(),
                // The user does not answer the prompt.
                Reply::Prompt if self.last_check().is_interactive => {}
                Reply::Prompt => {
                    let details = HashMap::<&str, &str>::new();
                    connection.reply(&header, &((false, true, details),)).await.unwrap();
                }
                Reply::None => {}
                Reply::Disconnect => return connection.close().await.unwrap(),
            }
        }
    }

    fn record_check(&self, message: &Message) {
        let body = message.body();
        let (subject, action, details, flags, cancellation_id) =
            body.deserialize::<(Subject, String, HashMap<String, String>, u32, String)>().unwrap();
        assert_eq!(details.len(), 3, "{details:?}");
        self.state().checks.push(Check {
            subject_name: <&str>::try_from(&subject.1["name"]).unwrap().to_owned(),
            subject_kind: subject.0,
            action,
            device: details["device"].clone(),
            file: details["file"].clone(),
            owner: details["owner"].clone(),
            is_interactive: flags == 1,
            cancellation_id,
        });
    }
}

/// An authority with a fake polkit, and a quota of one prompt for each uid.
struct Fixture {
    authority: Authority,
    polkit: FakePolkit,
    clients: Clients,
    // Closed with the fixture.
    _connection: Connection,
}

impl Fixture {
    async fn new(reply: Reply) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = Builder::unix_stream(theirs).server(Guid::generate()).p2p().build();
        let client = Builder::unix_stream(ours).p2p().build();
        let (server, connection) = tokio::try_join!(server, client).unwrap();
        let polkit = FakePolkit::default();
        tokio::spawn(polkit.clone().run(server, reply));
        let prompt_quota = Quota::new("open prompts", "answer one", Limits { each: 1, all: 10 });
        let authority = Authority::new(&connection, prompt_quota).await.unwrap();
        Self { authority, polkit, clients: Clients::default(), _connection: connection }
    }

    fn caller(&self, uid: u32, allows_interaction: bool) -> Caller {
        Caller::for_test(&self.clients, CLIENT, uid, allows_interaction)
    }

    /// Authorizes the removal of a device, which needs authorization for every uid but root.
    async fn authorize(&self, uid: u32, allows_interaction: bool) -> Result<(), Error> {
        self.authority.authorize(&self.caller(uid, allows_interaction), Request::Remove(5)).await
    }
}

async fn refusal(reply: Reply, allows_interaction: bool) -> Error {
    Fixture::new(reply).await.authorize(UID, allows_interaction).await.unwrap_err()
}

fn file(kind: FileKind) -> FileFacts {
    FileFacts {
        kind,
        path: b"/home/a/x\n.img".to_vec(),
        identity: FileIdentity { device: 1, inode: 2 },
        writable: true,
        appends: false,
        only_root_writes: false,
    }
}

fn attachment(owner: Option<u32>) -> Snapshot {
    Snapshot {
        id: DiskSequence(7),
        device: Device { number: 3, backing_file: b"/home/a/y.img".to_vec(), ..Device::default() },
        ownership: owner.map(|uid| Ownership::new(uid, None, Lifetime::Persistent)),
        state: AttachmentState::Attached,
        file_system: FileSystem::default(),
        mount_points: Vec::new(),
        cleartext: None,
        partitions: Vec::new(),
        warnings: Vec::new(),
        file_end: FileEnd::default(),
        saved_cleartexts: Vec::new(),
    }
}

#[tokio::test]
async fn root_needs_no_authorization() {
    let fixture = Fixture::new(NO).await;
    let root = fixture.caller(0, true);
    let (block_device, others) = (file(FileKind::BlockDevice), attachment(Some(UID)));
    for request in [
        Request::Attach(&block_device, None),
        Request::Change(&others),
        Request::Remove(5),
        Request::Mount(&others, None),
        Request::UnmountOthers(&others, None),
        Request::Unlock(&others, None),
        Request::Lock(&others, None),
    ] {
        fixture.authority.authorize(&root, request).await.unwrap();
    }
    assert!(!fixture.authority.needs_authorization(&root));
    assert!(fixture.authority.needs_authorization(&fixture.caller(UID, true)));
    assert_eq!(fixture.polkit.checks(), []);
}

#[tokio::test]
async fn owners_change_their_attachments_without_authorization() {
    let fixture = Fixture::new(NO).await;
    let own = attachment(Some(UID));
    for request in [Request::Change(&own), Request::Lock(&own, None), Request::Lock(&own, Some(2))] {
        fixture.authority.authorize(&fixture.caller(UID, false), request).await.unwrap();
    }
    assert_eq!(fixture.polkit.checks(), []);
}

#[tokio::test]
async fn each_request_has_its_action_and_details() {
    let fixture = Fixture::new(YES).await;
    let caller = fixture.caller(UID, false);
    let (regular, block_device) = (file(FileKind::Regular), file(FileKind::BlockDevice));
    let (own, others, foreign) = (attachment(Some(UID)), attachment(Some(OTHER_UID)), attachment(None));
    let (x, y) = (r"/home/a/x\n.img", "/home/a/y.img");
    for (request, action, device, file, owner) in [
        (Request::Attach(&regular, None), "attach", "", x, "1000"),
        (Request::Attach(&regular, Some(5)), "attach", "/dev/loop5", x, "1000"),
        (Request::Attach(&block_device, None), "attach-device", "", x, "1000"),
        (Request::Change(&others), "manage-others", "/dev/loop3", y, "1001"),
        (Request::Change(&foreign), "manage-others", "/dev/loop3", y, ""),
        (Request::Remove(5), "manage-others", "/dev/loop5", "", ""),
        (Request::Mount(&own, None), "mount", "/dev/loop3", y, "1000"),
        (Request::Mount(&own, Some(2)), "mount", "/dev/loop3p2", y, "1000"),
        (Request::Mount(&others, None), "manage-others", "/dev/loop3", y, "1001"),
        (Request::Mount(&foreign, Some(2)), "manage-others", "/dev/loop3p2", y, ""),
        (Request::UnmountOthers(&own, None), "manage-others", "/dev/loop3", y, "1000"),
        (Request::UnmountOthers(&others, Some(2)), "manage-others", "/dev/loop3p2", y, "1001"),
        (Request::Unlock(&own, None), "unlock", "/dev/loop3", y, "1000"),
        (Request::Unlock(&own, Some(2)), "unlock", "/dev/loop3p2", y, "1000"),
        (Request::Unlock(&others, None), "manage-others", "/dev/loop3", y, "1001"),
        (Request::Unlock(&foreign, Some(2)), "manage-others", "/dev/loop3p2", y, ""),
        (Request::Lock(&others, Some(2)), "manage-others", "/dev/loop3p2", y, "1001"),
        (Request::Lock(&foreign, None), "manage-others", "/dev/loop3", y, ""),
    ] {
        fixture.authority.authorize(&caller, request).await.unwrap();
        let Check { cancellation_id, .. } = fixture.polkit.last_check();
        let expected = Check {
            subject_kind: "system-bus-name".to_owned(),
            subject_name: CLIENT.to_owned(),
            action: format!("org.loopd1.{action}"),
            device: device.to_owned(),
            file: file.to_owned(),
            owner: owner.to_owned(),
            is_interactive: false,
            cancellation_id,
        };
        assert_eq!(fixture.polkit.last_check(), expected, "{request:?}");
    }
}

#[tokio::test]
async fn each_check_has_its_own_cancellation_id() {
    let fixture = Fixture::new(YES).await;
    for _ in 0..3 {
        fixture.authorize(UID, false).await.unwrap();
    }
    let ids: Vec<String> = fixture.polkit.checks().into_iter().map(|check| check.cancellation_id).collect();
    assert_eq!(ids, ["loopd-0", "loopd-1", "loopd-2"]);
}

#[tokio::test]
async fn the_interactive_flag_of_the_call_is_passed_on_if_a_prompt_is_needed() {
    let fixture = Fixture::new(CHALLENGE).await;
    for (allows_interaction, expected) in [(false, vec![false]), (true, vec![false, false, true])] {
        fixture.authorize(UID, allows_interaction).await.unwrap_err();
        let checks = fixture.polkit.checks().into_iter().map(|check| check.is_interactive);
        assert_eq!(checks.collect::<Vec<_>>(), expected);
    }
}

#[tokio::test]
async fn a_negative_result_is_access_denied() {
    for allows_interaction in [false, true] {
        let error = refusal(NO, allows_interaction).await;
        assert_eq!(error.kind, ErrorKind::AccessDenied);
        assert_eq!(error.message, "not authorized for org.loopd1.manage-others");
    }
}

#[tokio::test]
async fn a_challenge_requires_interaction_unless_the_call_allowed_it() {
    let error = refusal(CHALLENGE, false).await;
    assert_eq!(error.kind, ErrorKind::InteractiveAuthorizationRequired);
    assert!(error.message.starts_with("org.loopd1.manage-others needs"), "{error}");
    // No authentication agent was there to prompt.
    assert_eq!(refusal(CHALLENGE, true).await.kind, ErrorKind::AccessDenied);
}

#[tokio::test]
async fn a_dismissed_prompt_is_access_denied() {
    let error = refusal(DISMISSED, true).await;
    assert_eq!(error.kind, ErrorKind::AccessDenied);
    assert!(error.message.contains("dismissed"), "{error}");
}

#[tokio::test]
async fn errors_and_invalid_replies_are_access_denied() {
    for reply in [Reply::Error, Reply::Invalid, Reply::Disconnect] {
        for allows_interaction in [false, true] {
            let error = refusal(reply, allows_interaction).await;
            assert_eq!(error.kind, ErrorKind::AccessDenied, "{reply:?}");
            assert!(error.message.contains("polkit cannot be reached"), "{reply:?}: {error}");
        }
    }
}

#[tokio::test]
async fn a_check_without_a_prompt_times_out_and_is_cancelled() {
    let fixture = Fixture::new(Reply::None).await;
    tokio::time::pause();
    let start = Instant::now();
    let error = fixture.authorize(UID, false).await.unwrap_err();
    assert_eq!(start.elapsed().as_secs(), TIMEOUT.as_secs());
    assert_eq!(error.kind, ErrorKind::AccessDenied);
    assert!(error.message.contains("in time"), "{error}");
    assert_eq!(fixture.polkit.state().cancelled, ["loopd-0"]);
}

#[tokio::test]
async fn a_prompt_lasts_until_the_caller_disconnects() {
    let fixture = Fixture::new(Reply::Prompt).await;
    let caller = fixture.caller(UID, true);
    tokio::time::pause();
    let authorization = fixture.authority.authorize(&caller, Request::Remove(5));
    tokio::pin!(authorization);
    let hour = Duration::from_secs(3600);
    assert!(tokio::time::timeout(hour, &mut authorization).await.is_err(), "a prompt has no timeout");
    fixture.clients.disconnected(caller.client());
    let error = authorization.await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::AccessDenied);
    assert!(error.message.contains("disconnected before polkit answered"), "{error}");
    assert_eq!(fixture.polkit.state().cancelled, ["loopd-1"]);
}

#[tokio::test]
async fn open_prompts_of_a_uid_are_limited() {
    let fixture = Fixture::new(Reply::Prompt).await;
    tokio::time::pause();
    let first_caller = fixture.caller(UID, true);
    let mut first = Box::pin(fixture.authority.authorize(&first_caller, Request::Remove(5)));
    assert!(tokio::time::timeout(Duration::from_secs(1), &mut first).await.is_err());
    let error = fixture.authorize(UID, true).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::LimitExceeded);
    let prompts = || fixture.polkit.checks().iter().filter(|check| check.is_interactive).count();
    assert_eq!(prompts(), 1, "polkit does not prompt beyond the limit");
    // Checks without a prompt and prompts of other uids are allowed.
    let error = fixture.authorize(UID, false).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::InteractiveAuthorizationRequired);
    let other = fixture.authorize(OTHER_UID, true);
    assert!(tokio::time::timeout(Duration::from_secs(1), other).await.is_err());
    drop(first);
    let again = fixture.authorize(UID, true);
    assert!(tokio::time::timeout(Duration::from_secs(1), again).await.is_err(), "the prompt has ended");
    assert_eq!(prompts(), 3);
}

#[tokio::test]
async fn an_authorized_caller_gets_no_prompt() {
    let fixture = Fixture::new(YES).await;
    for _ in 0..3 {
        fixture.authorize(UID, true).await.unwrap();
    }
    assert!(fixture.polkit.checks().iter().all(|check| !check.is_interactive));
}

#[tokio::test]
async fn checks_of_a_uid_are_paced() {
    let fixture = Fixture::new(YES).await;
    let start = Instant::now();
    for _ in 0..CHECKS_AT_ONCE + 10 {
        fixture.authorize(UID, false).await.unwrap();
    }
    assert!(start.elapsed() >= Duration::from_secs(10) / CHECKS_PER_SECOND);
}

#[tokio::test]
async fn a_caller_that_disconnects_before_its_check_is_refused() {
    let fixture = Fixture::new(YES).await;
    let caller = fixture.caller(UID, false);
    let _booked = fixture.authority.pace.book(Instant::now().into_std(), UID, 100 * CHECKS_AT_ONCE);
    fixture.clients.disconnected(caller.client());
    let error = fixture.authority.authorize(&caller, Request::Remove(5)).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::AccessDenied);
    assert!(error.message.contains("before polkit was asked"), "{error}");
    assert_eq!(fixture.polkit.checks(), []);
}
