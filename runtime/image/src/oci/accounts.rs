//! Who the configuration's `User` is: the image's own /etc/passwd and /etc/group, read once when the image is
//! built. Pure.

use serde::{Deserialize, Serialize};

/// More of /etc/passwd or /etc/group than this is not looked at.
pub(super) const MOST_BYTES: u64 = 1 << 20;

/// Who runs the image's commands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User number.
    pub uid: u32,
    /// Group number.
    pub gid: u32,
    /// Home directory.
    pub home: String,
}

/// The accounts of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Accounts {
    users: Vec<(String, User)>,
    groups: Vec<(String, u32)>,
}

impl Accounts {
    /// From the two files; lines that are none are left out.
    pub(super) fn parse(passwd: &[u8], group: &[u8]) -> Self {
        let lines = |text: &[u8]| -> Vec<Vec<String>> {
            let text = String::from_utf8_lossy(text);
            text.lines().map(|line| line.split(':').map(str::to_owned).collect()).collect()
        };
        let id = |field: Option<&String>| field.and_then(|field| field.parse::<u32>().ok());
        let user = |line: &Vec<String>| {
            let home = line.get(5).filter(|home| home.starts_with('/')).map_or("/", String::as_str);
            let user = User { uid: id(line.get(2))?, gid: id(line.get(3))?, home: home.to_owned() };
            Some((line.first()?.clone(), user))
        };
        let group_of = |line: &Vec<String>| Some((line.first()?.clone(), id(line.get(2))?));
        Self {
            users: lines(passwd).iter().filter_map(user).collect(),
            groups: lines(group).iter().filter_map(group_of).collect(),
        }
    }

    /// `USER` or `USER:GROUP`, each a name or a number; empty is root. The error is a reason in words.
    pub(super) fn user(&self, text: &str) -> Result<User, String> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (text, None),
        };
        let user = if user.is_empty() { "0" } else { user };
        let named = self.users.iter().find(|(name, _)| name == user).map(|(_, user)| user);
        // u32::MAX is "leave it" in setuid(2)'s relatives, never anybody.
        let number = |text: &str| text.parse::<u32>().ok().filter(|&id| id != u32::MAX);
        let found = match (named, number(user)) {
            (Some(found), _) => found.clone(),
            (None, Some(uid)) => {
                let account =
                    self.users.iter().find(|(_, user)| user.uid == uid).map(|(_, user)| user.clone());
                let home = if uid == 0 { "/root" } else { "/" };
                account.unwrap_or(User { uid, gid: 0, home: home.to_owned() })
            }
            (None, None) if user == "root" => User { uid: 0, gid: 0, home: "/root".to_owned() },
            (None, None) => return Err(format!("user {user:?} is not in the image's /etc/passwd")),
        };
        let Some(group) = group else { return Ok(found) };
        let named = self.groups.iter().find(|(name, _)| name == group).map(|(_, gid)| *gid);
        let gid = named.or_else(|| number(group));
        let gid = gid.ok_or_else(|| format!("group {group:?} is not in the image's /etc/group"))?;
        Ok(User { gid, ..found })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_and_number_and_unknown_names_are_not() {
        let accounts = Accounts::parse(
            b"root:x:0:0:root:/root:/bin/sh\nnode:x:1000:1000::/home/node:/bin/sh\nbroken\n::::\n",
            b"root:x:0:\nstaff:x:50:\n",
        );
        let user = |uid, gid, home: &str| User { uid, gid, home: home.to_owned() };
        for (text, wanted) in [
            ("", user(0, 0, "/root")),
            ("root", user(0, 0, "/root")),
            ("node", user(1000, 1000, "/home/node")),
            ("1000", user(1000, 1000, "/home/node")),
            ("node:staff", user(1000, 50, "/home/node")),
            ("node:7", user(1000, 7, "/home/node")),
            ("4242", user(4242, 0, "/")),
            ("4242:4243", user(4242, 4243, "/")),
        ] {
            assert_eq!(accounts.user(text).unwrap(), wanted, "{text}");
        }
        assert!(accounts.user("nobody").unwrap_err().contains("/etc/passwd"));
        assert!(accounts.user("node:wheel").unwrap_err().contains("/etc/group"));
        assert!(accounts.user("4294967295").is_err());
        assert_eq!(Accounts::default().user("").unwrap(), user(0, 0, "/root"));
    }
}
