//! The merged file system in memory: names, modes, owners, xattrs, links; contents only where they are tiny.
//! Pure. Symbolic links are followed inside the tree and nowhere else, `..` above the root is the root.

use std::collections::BTreeMap;

/// The name of a whiteout is this and the name it hides (OCI image layer specification).
const WHITEOUT: &[u8] = b".wh.";
/// Hides all that lower layers have in this directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// As Linux, MAXSYMLINKS.
const MOST_LINKS_FOLLOWED: usize = 40;
/// As Linux, NAME_MAX, which EROFS shares.
const NAME_MAX_BYTES: usize = 255;

/// A place in [`Tree::nodes`].
pub(crate) type NodeId = u32;

pub(crate) const ROOT: NodeId = 0;

/// What every file has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits, the lower twelve.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime_s: u64,
    /// Full names and values, by name.
    pub(crate) xattrs: Box<[Xattr]>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Xattr {
    pub(crate) name: Box<[u8]>,
    pub(crate) value: Box<[u8]>,
}

/// What a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    Directory(BTreeMap<Box<[u8]>, Dirent>),
    /// Contents in the image file.
    File {
        block: u32,
        bytes: u64,
    },
    /// Contents so small that they lie beside their inode.
    Small(Box<[u8]>),
    Symlink(Box<[u8]>),
    Device {
        character: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// A name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dirent {
    pub(crate) node: NodeId,
    /// The layer that mentioned it last; whiteouts hide only what is older than their own.
    layer: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) body: Body,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    layer: u32,
}

/// Why an entry cannot be placed, in words that follow its name.
pub(crate) type Reason = String;

impl Tree {
    /// An empty root.
    pub(crate) fn new() -> Self {
        let meta = Meta { mode: 0o755, ..Meta::default() };
        Self { nodes: vec![Node { meta, body: Body::Directory(BTreeMap::new()) }], layer: 0 }
    }

    /// What follows belongs to the next layer.
    pub(crate) fn next_layer(&mut self) {
        self.layer += 1;
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    /// Nodes made so far; those that were replaced count too.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Is this the name of a whiteout?
    pub(crate) fn is_whiteout(path: &[u8]) -> bool {
        path.rsplit(|&b| b == b'/')
            .find(|part| !part.is_empty())
            .is_some_and(|name| name.starts_with(WHITEOUT))
    }

    /// Places an entry: a directory over a directory changes its attributes, everything else replaces.
    pub(crate) fn put(&mut self, path: &[u8], meta: Meta, body: Body) -> Result<(), Reason> {
        let parts = components(path)?;
        let is_directory = matches!(body, Body::Directory(_));
        let Some((name, parents)) = parts.split_last() else {
            return if is_directory {
                self.nodes[ROOT as usize].meta = meta;
                Ok(())
            } else {
                Err("would replace the root directory".to_owned())
            };
        };
        let parent = self.descend(parents)?;
        let layer = self.layer;
        if let Some(existing) = self.children(parent).get_mut(*name) {
            existing.layer = layer;
            let node = existing.node;
            if is_directory && matches!(self.node(node).body, Body::Directory(_)) {
                self.nodes[node as usize].meta = meta;
                return Ok(());
            }
        }
        let node = self.add(meta, body)?;
        self.children(parent).insert((*name).into(), Dirent { node, layer });
        Ok(())
    }

    /// One more name for what `target` names.
    pub(crate) fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), Reason> {
        let (parts, target_parts) = (components(path)?, components(target)?);
        let missing =
            || format!("is a hard link to {:?}, which is not there", String::from_utf8_lossy(target));
        let (target_name, target_parents) = target_parts.split_last().ok_or("is a hard link to the root")?;
        let directory = self.resolve(target_parents).ok_or_else(missing)?;
        let node = self.child(directory, target_name).ok_or_else(missing)?.node;
        if matches!(self.node(node).body, Body::Directory(_)) {
            return Err("is a hard link to a directory".to_owned());
        }
        let (name, parents) = parts.split_last().ok_or("would replace the root directory")?;
        let parent = self.descend(parents)?;
        let layer = self.layer;
        self.children(parent).insert((*name).into(), Dirent { node, layer });
        Ok(())
    }

    /// Hides what older layers have under the whiteout's name, or in its directory.
    pub(crate) fn whiteout(&mut self, path: &[u8]) -> Result<(), Reason> {
        let parts = components(path)?;
        let (name, parents) = parts.split_last().ok_or("hides the root directory")?;
        // What is not there needs no hiding, and makes no directories.
        let Some(parent) = self.resolve(parents) else { return Ok(()) };
        if !matches!(self.node(parent).body, Body::Directory(_)) {
            return Ok(());
        }
        if *name == OPAQUE {
            self.hide_older(parent);
            return Ok(());
        }
        let hidden = name.strip_prefix(WHITEOUT).unwrap_or_default();
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err("is a whiteout of no name".to_owned());
        }
        if hidden.starts_with(WHITEOUT) {
            // Reserved by AUFS for its own metadata.
            return Ok(());
        }
        let Some(dirent) = self.child(parent, hidden) else { return Ok(()) };
        if dirent.layer < self.layer {
            self.children(parent).remove(hidden);
        } else if matches!(self.node(dirent.node).body, Body::Directory(_)) {
            self.hide_older(dirent.node);
        }
        Ok(())
    }

    /// The directory at `path`, made with its parents where it is missing.
    pub(crate) fn ensure_directory(&mut self, path: &[u8]) -> Result<(), Reason> {
        let parts = components(path)?;
        self.descend(&parts).map(drop)
    }

    /// What `path` names, the last component's links followed too.
    pub(crate) fn lookup(&self, path: &[u8]) -> Option<&Node> {
        Some(self.node(self.resolve(&components(path).ok()?)?))
    }

    /// Removes, at any depth, what the layer at hand has not mentioned.
    fn hide_older(&mut self, directory: NodeId) {
        let mut rest = vec![directory];
        while let Some(directory) = rest.pop() {
            let layer = self.layer;
            self.children(directory).retain(|_, dirent| dirent.layer == layer);
            let kept: Vec<NodeId> = self.children(directory).values().map(|dirent| dirent.node).collect();
            rest.extend(kept.into_iter().filter(|&id| matches!(self.node(id).body, Body::Directory(_))));
        }
    }

    /// What these components lead to, if they do.
    fn resolve(&self, parts: &[&[u8]]) -> Option<NodeId> {
        let mut walk = Walk::new(parts);
        let mut at = ROOT;
        while let Some(part) = walk.next_part() {
            match part.as_slice() {
                b".." => at = walk.up(),
                name => {
                    let child = self.child(at, name)?.node;
                    match &self.node(child).body {
                        Body::Symlink(target) => at = walk.follow(target, at).ok()?,
                        _ => {
                            walk.down(at);
                            at = child;
                        }
                    }
                }
            }
        }
        Some(at)
    }

    /// The directory these components lead to, each made where it is missing and noted as of this layer.
    fn descend(&mut self, parts: &[&[u8]]) -> Result<NodeId, Reason> {
        let mut walk = Walk::new(parts);
        let mut at = ROOT;
        while let Some(part) = walk.next_part() {
            if part == b".." {
                at = walk.up();
                continue;
            }
            let child = match self.child(at, &part) {
                Some(dirent) => dirent.node,
                None => {
                    self.add(Meta { mode: 0o755, ..Meta::default() }, Body::Directory(BTreeMap::new()))?
                }
            };
            if let Body::Symlink(target) = &self.node(child).body {
                at = walk.follow(&target.clone(), at)?;
                continue;
            }
            if !matches!(self.node(child).body, Body::Directory(_)) {
                let name = String::from_utf8_lossy(&part).into_owned();
                return Err(format!("lies below {name:?}, which is not a directory"));
            }
            let layer = self.layer;
            self.children(at).insert(part.into(), Dirent { node: child, layer });
            walk.down(at);
            at = child;
        }
        Ok(at)
    }

    fn add(&mut self, meta: Meta, body: Body) -> Result<NodeId, Reason> {
        let id = NodeId::try_from(self.nodes.len()).map_err(|_| "is one entry too many")?;
        self.nodes.push(Node { meta, body });
        Ok(id)
    }

    fn child(&self, directory: NodeId, name: &[u8]) -> Option<Dirent> {
        match &self.node(directory).body {
            Body::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    /// The names in a directory; the callers know that it is one.
    fn children(&mut self, directory: NodeId) -> &mut BTreeMap<Box<[u8]>, Dirent> {
        let body = &mut self.nodes[directory as usize].body;
        if !matches!(body, Body::Directory(_)) {
            *body = Body::Directory(BTreeMap::new());
        }
        match body {
            Body::Directory(children) => children,
            _ => unreachable!("made one above"),
        }
    }
}

/// A walk down from the root: components still to go, last first, and the directories above.
struct Walk {
    rest: Vec<Vec<u8>>,
    above: Vec<NodeId>,
    followed: usize,
}

impl Walk {
    fn new(parts: &[&[u8]]) -> Self {
        Self { rest: parts.iter().rev().map(|part| part.to_vec()).collect(), above: Vec::new(), followed: 0 }
    }

    fn next_part(&mut self) -> Option<Vec<u8>> {
        self.rest.pop()
    }

    fn down(&mut self, from: NodeId) {
        self.above.push(from);
    }

    /// Above the root is the root.
    fn up(&mut self) -> NodeId {
        self.above.pop().unwrap_or(ROOT)
    }

    /// Where a link found in the directory `at` goes on.
    fn follow(&mut self, target: &[u8], at: NodeId) -> Result<NodeId, Reason> {
        self.followed += 1;
        if self.followed > MOST_LINKS_FOLLOWED {
            return Err("lies behind too many symbolic links".to_owned());
        }
        let parts = target.split(|&b| b == b'/').filter(|part| !part.is_empty() && *part != b".");
        self.rest.extend(parts.rev().map(<[u8]>::to_vec));
        if target.starts_with(b"/") {
            self.above.clear();
            return Ok(ROOT);
        }
        Ok(at)
    }
}

/// The components of an entry's path. A leading `/` means nothing; `..` is refused rather than resolved, because
/// no honest layer has it.
pub(crate) fn components(path: &[u8]) -> Result<Vec<&[u8]>, Reason> {
    if path.contains(&0) {
        return Err("has a name with a NUL in it".to_owned());
    }
    let parts: Vec<&[u8]> =
        path.split(|&b| b == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.iter().any(|part| *part == b"..") {
        return Err("leads upwards with \"..\"".to_owned());
    }
    if parts.iter().any(|part| part.len() > NAME_MAX_BYTES) {
        return Err(format!("has a name of more than {NAME_MAX_BYTES} bytes"));
    }
    Ok(parts)
}
